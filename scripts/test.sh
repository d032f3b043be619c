#!/usr/bin/env bash
# Set up what the tests need (once), then check style and run every test. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=scripts/venv.sh
source scripts/venv.sh test
export OMP_NUM_THREADS=1
"$PY" -m ruff check src scripts plotting tests
"$PY" -m pytest "$@"
