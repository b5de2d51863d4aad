#!/usr/bin/env bash
# Sets itself up, then the whole pipeline on the embedded world, a table and a report: ./scripts/quickstart.sh
# Another seed, which is another world, other people and other models: SEED=1 WORKDIR=runs/micro-1 ./scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."
if (($#)); then
  sed -n '2,3s/^# //p' scripts/quickstart.sh
  [[ "$1" == --help || "$1" == -h ]] && exit 0
  echo "error: it takes no arguments, but PYTHON, VENV, SEED and WORKDIR from the environment" >&2
  exit 2
fi
source scripts/setup.sh plots

python scripts/experiment.py "experiments/alignment.py:micro,${SEED:-0}" --workdir "${WORKDIR:-runs/micro}"
