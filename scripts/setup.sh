# Sourced by the other scripts. Installs the project with the extras $1 into the virtual
# environment .venv, unless they are installed, and activates the environment. PYTHON and
# VENV select another interpreter and another environment.
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "error: $python is missing or older than Python 3.11; choose another with PYTHON=/path/to/python" >&2
  exit 2
fi
venv=${VENV:-.venv}

# The installation is repeated only for other extras or after a change of setup.cfg.
stamp="$venv/installed-$1-$(cksum < setup.cfg | cut -d' ' -f1)"
if [[ ! -e "$stamp" ]]; then
  if ! "$python" -m venv "$venv"; then
    echo "error: $python cannot create virtual environments; on Debian: apt-get install python3-venv" >&2
    exit 2
  fi
  echo "installing into $venv …"
  # Byte code is written when a module is first imported. Compiling all modules now would
  # take a sixth of the disk space for modules that are never imported.
  "$venv/bin/pip" install --quiet --disable-pip-version-check --no-compile -e ".[$1]"
  touch "$stamp"
fi
source "$venv/bin/activate"

# XLA on a CPU allocates the memory of a program anew for every run, and Linux fills it with
# zeros page by page, which takes a sixth of a training step with small pages. Where Linux
# grants large pages on request ("madvise"), let glibc request them.
if [[ -z "${GLIBC_TUNABLES+set}" ]] &&
  grep -qsF '[madvise]' /sys/kernel/mm/transparent_hugepage/enabled; then
  export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
fi
