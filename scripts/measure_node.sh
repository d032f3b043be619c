#!/usr/bin/env bash
# Measure this machine's GPUs: tests, layer, exchange, plans, figures 8 and 10 to 13, a recorded trace, Alpa's benchmark.
#
#   scripts/measure_node.sh [--minutes M] [--out DIR] [--list] [--only PART ..] [--trace FILE] [--cluster auto|local|cpu]
#
#   --minutes   come back after so many minutes; the next call goes on
#   --out       the run-set (default: logs/<device>x<GPUs>-<date>); brought along, it is continued on another machine of the kind
#   --list      print the parts with their minutes and state, run nothing
#   --only      these parts, or all whose names begin so
#   --trace     the published trace (.npz or its folder of tables); without it its parts are skipped
#   --cluster   auto (default): GPUs if there are any; cpu: the few parts that have a small form for processors
# Commits nothing. PY=python3 in front takes that Python as it is; no network is needed then.
# Exit codes: 0 nothing is left to do; 1 a part failed; 2 bad input; 3 the minutes were over; 130 or 143 interrupted.
set -euo pipefail
for argument in "$@"; do
  case "$argument" in -h | --help) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
done
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/venv.sh
. "$root/scripts/venv.sh" train
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
exec "$PY" "$root/scripts/measure_node.py" "$@"
