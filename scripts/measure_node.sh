#!/usr/bin/env bash
# Measure this machine's GPUs: tests, layer, exchange, plans, figures 8 and 10 to 13, a recorded trace, Alpa's benchmark.
#
#   scripts/measure_node.sh [--minutes M] [--out DIR] [--list] [--only PART ..]      --help explains the options
#
# Everything goes into one run-set, logs/<device>x<GPUs>-<date>/; a second call goes on where the first ended, on another machine
# too if that folder is brought along. PY=python3 in front takes that Python as it is (no network needed). Commits nothing.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/venv.sh
. "$root/scripts/venv.sh" train
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
exec "$PY" "$root/scripts/measure_node.py" "$@"
