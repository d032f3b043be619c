#!/usr/bin/env bash
# Set up what the tests need (once), then check style and run every test, two files at a time.
#
#   ./scripts/test.sh [ARGUMENTS OF PYTEST]
#
#   ./scripts/test.sh tests/test_gates.py    only these
#   ./scripts/test.sh -n 0 -m gpu            the checks marked gpu: what runs on GPUs must run alone
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
case "${1:-}" in -h | --help) sed -n '2,7s/^# \{0,1\}//p' scripts/test.sh; exit 0 ;; esac
# shellcheck source=scripts/venv.sh
source scripts/venv.sh test
export OMP_NUM_THREADS=1
"$PY" -m ruff check src scripts plotting tests
"$PY" -m pytest -n 2 --dist loadfile "$@"
