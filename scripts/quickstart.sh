#!/usr/bin/env bash
# Sets itself up, then the whole pipeline on the embedded world, a table and a figure: ./scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh plots

python scripts/experiment.py experiments/alignment.py:micro --workdir "${WORKDIR:-runs/micro}"
