# Sourced by the other scripts: a virtual environment in .venv with the project and the extra named in $1, made once.
python=${PYTHON:-python3}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  echo "error: $python is missing or older than Python 3.11; name another with PYTHON=/path/to/python" >&2
  exit 2
fi
venv=${VENV:-.venv}
stamp="$venv/installed-$1-$(cksum < setup.cfg | cut -d' ' -f1)"
if [[ ! -e "$stamp" ]]; then
  if ! "$python" -m venv "$venv"; then
    echo "error: $python cannot make virtual environments; on Debian: apt-get install python3-venv" >&2
    exit 2
  fi
  echo "installing into $venv …"
  # Byte code is written when a module is first used: a sixth of the disk is for modules that never are.
  "$venv/bin/pip" install --quiet --disable-pip-version-check --no-compile -e ".[$1]"
  touch "$stamp"
fi
source "$venv/bin/activate"

# XLA:CPU allocates the memory of a program anew for each run, and Linux fills it with zeros page by page: with small
# pages that takes a sixth of a training step. Where Linux grants large pages on request ("madvise"), glibc asks for them.
large_pages=/sys/kernel/mm/transparent_hugepage/enabled
if [[ -z "${GLIBC_TUNABLES+set}" ]] && grep -qs '\[madvise\]' "$large_pages"; then
  export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
fi
