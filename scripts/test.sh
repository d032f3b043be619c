#!/usr/bin/env bash
# Set up what the tests need (once), then check style and run every test, two files at a time. Arguments go to pytest: what runs on
# GPUs must run alone, with -n 0.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/venv.sh
source scripts/venv.sh test
export OMP_NUM_THREADS=1
"$PY" -m ruff check src scripts plotting tests
"$PY" -m pytest -n 2 --dist loadfile "$@"
