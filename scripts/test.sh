#!/usr/bin/env bash
# Installs the project, then checks format, lint and types, and runs the tests:
#   ./scripts/test.sh [pytest arguments]
#   ./scripts/test.sh coverage   the same with line coverage; takes a quarter longer
#   ./scripts/test.sh slow       the tests that take minutes
#   ./scripts/test.sh fuzz       more than 100,000 random inputs
#   ./scripts/test.sh interop    compares with transformers; installs torch into a separate
#                                environment
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
