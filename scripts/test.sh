#!/usr/bin/env bash
# Sets itself up, then format, lint, types and tests: ./scripts/test.sh; which lines they run, a quarter slower:
# ./scripts/test.sh coverage; minutes-long checks: ./scripts/test.sh slow; 100,000 random inputs: ./scripts/test.sh fuzz;
# against transformers, in an environment of its own, since torch is large: ./scripts/test.sh interop
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ "${1:-}" == "interop" ]]; then
  VENV=${VENV:-.venv-interop}
  source scripts/setup.sh interop
  exec pytest -m interop "${@:2}"
fi
source scripts/setup.sh dev
if [[ "${1:-}" == "fuzz" ]]; then
  exec pytest -m fuzz -s "${@:2}"
fi

ruff format --check .
ruff check .
pyright
quick=(pytest -m "not slow and not fuzz" -n 2)
if [[ "${1:-}" == "slow" ]]; then
  pytest -m slow "${@:2}"
elif [[ "${1:-}" == "coverage" ]]; then
  "${quick[@]}" --cov=instructax --cov-report=term:skip-covered --cov-fail-under=90 "${@:2}"
else
  "${quick[@]}" "$@"
fi
