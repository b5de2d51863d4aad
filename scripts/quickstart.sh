#!/usr/bin/env bash
# Installs the project, runs the whole pipeline on simulated data, and writes a report:
#   ./scripts/quickstart.sh
# Another seed gives another simulated world and other models:
#   SEED=1 WORKDIR=runs/micro-1 ./scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."
if (($#)); then
  sed -n '2,5s/^# //p' scripts/quickstart.sh
  [[ "$1" == --help || "$1" == -h ]] && exit 0
  echo "error: it takes no arguments; set PYTHON, VENV, SEED or WORKDIR instead" >&2
  exit 2
fi
source scripts/setup.sh plots

python scripts/experiment.py "experiments/alignment.py:micro,${SEED:-0}" \
  --workdir "${WORKDIR:-runs/micro}"
