#!/usr/bin/env bash
# Sets itself up, then format, lint, types and tests: ./scripts/test.sh; minutes-long checks: ./scripts/test.sh slow
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup.sh dev

ruff format --check .
ruff check .
pyright
if [[ "${1:-}" == "slow" ]]; then
  pytest -m slow
else
  pytest -m "not slow" -n 2 --dist loadgroup --cov=instructax --cov-report=term:skip-covered --cov-fail-under=90 "$@"
fi
