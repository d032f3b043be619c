#!/usr/bin/env bash
# Figures 8-13 from the logs in this repository; no GPU, under a minute.
#
#   ./RUNME-a.sh [--logs DIR ...] [--out DIR] [--help]
#
#   --logs DIR  draw from DIR only (measured run-sets, or raw logs of the published artifact) instead of logs/
#   --out DIR   write there instead of outputs_from_log_<UTC time>
#
# For instance:
#   ./RUNME-a.sh                                               all figures of the paper and of the runs in this repository
#   ./RUNME-a.sh --logs logs/cpu-20261122 --out figures        those of one run-set
#   ./RUNME-a.sh --logs outputs_from_exec_DATE/logs            those of your own runs
#
# Writes fig8 .. fig13 as PDF and PNG, values.json (every number and its source) and index.html (all of it on one page).
# Exit codes: 0 drawn; 1 nothing could be drawn; 2 bad usage or missing directory.
set -euo pipefail
for argument in "$@"; do
  case "$argument" in -h | --help) sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 0 ;; esac
done
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=scripts/venv.sh
. "$root/scripts/venv.sh" plot
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" exec "$PY" -P -m plotting "$@"
