#!/usr/bin/env bash
# Run the experiments on this machine or a Slurm cluster, then draw the figures from what was measured.
#
#   ./RUNME-b.sh [--cluster auto|NAME] [--figures "8 10"] [--gpus "1 2 4"] [--data FILE ..] [--dry-run] [--resume [DIR]] [--max-jobs N]
#
#   Runs go to outputs_from_exec_<UTC time>/logs, the figures beside them. Figures not built yet say what they wait for.
#   --cluster   a file of scripts/clusters: cpu (4 processes here, under 15 minutes), local (this machine's GPUs), slurm or
#               another (a Slurm job for each run); auto (default): Slurm where it answers, else GPUs, else cpu
#   --figures   only these (default: all); --only REGEX: of their runs only those in whose path this is found
#   --gpus "1 2 4"  on GPUs of this machine: runs on so many each, side by side where they fit (default: on all)
#   --data      text files or .bin/.idx prefixes to train on (default: Python's library); figure 9: a folder of images, or synthetic
#   --slow-links GB/S   slow every exchange between ranks down to this rate, to stand in for a slow network; panels say so
#   --dry-run   check everything and print the runs with their plans and minutes; start nothing
#   --resume    go on in DIR (default: the newest outputs_from_exec_*): runs done or in the queue stay, others are done again. Alone
#               with the cluster, figures, runs and data asked for there last; where one of these is given, with what is given only
#   --max-jobs  on Slurm: at most N runs in the queue at a time
# For instance:
#   ./RUNME-b.sh --cluster cpu --figures 8 --dry-run           what figure 8 would run here, and for how long
#   ./RUNME-b.sh --cluster cpu --figures 8 --only fastmoe      its runs of FastMoE
#   ./RUNME-b.sh --cluster slurm --max-jobs 4                  everything, as jobs of which at most four are in the queue
#   ./RUNME-b.sh --resume                                      goes on with the last of these
# PY=python3 ./RUNME-b.sh uses that Python as it is, with what it has: nothing is installed, no network is needed. On GPUs build the
# CUDA extension first, then: python3 setup.py build_ext --inplace
# Exit codes: 0 all runs ok; 1 some did not end well; 2 bad input; 130 or 143 interrupted (what it says goes on).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
out="$root/outputs_from_exec_$(date -u +%Y%m%dT%H%M%SZ)" dry="" args=()
while (($#)); do
  case "$1" in
    -h | --help) sed -n '2,25s/^# \{0,1\}//p' "$root/RUNME-b.sh"; exit 0 ;;
    --dry-run) dry=1 ;;&
    --resume)
      if [[ -n "${2:-}" && "$2" != --* ]]; then out="$2"; shift
        [[ -d "$out/logs" ]] || { echo "RUNME-b: $out holds no logs/ of runs to resume" >&2; exit 2; }
      else out="$(find "$root" -maxdepth 1 -type d -name 'outputs_from_exec_[0-9]*' | sort | tail -n 1)"; fi
      [[ -d "$out" ]] || { echo "RUNME-b: there is no ${out:-outputs_from_exec_*} to resume" >&2; exit 2; }
      args+=(--resume) ;;
    *) args+=("$1") ;;
  esac
  shift
done
# shellcheck source=scripts/venv.sh
. "$root/scripts/venv.sh" train
"$PY" "$root/scripts/launch.py" --out "$out" ${args[@]+"${args[@]}"} & launcher=$!
trap 'kill -TERM "$launcher" 2>/dev/null || true' INT TERM # the launcher stops its run, or leaves its jobs; wait for that
code=0; wait "$launcher" || code=$?
while kill -0 "$launcher" 2>/dev/null; do code=0; wait "$launcher" || code=$?; done
if [[ -z "$dry" && $code -le 1 && ! "$out/index.html" -nt "$out/.lock" ]]; then # unless a job of Slurm drew them
  PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "$PY" -P -m plotting --logs "$out/logs" --out "$out" || code=1
fi
exit "$code"
