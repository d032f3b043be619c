#!/usr/bin/env bash
# The DeepSpeed MoE benchmark of Alpa's artifact: run_deepspeed_benchmark.sh NUM_GPUS [options]; --help explains them.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
# shellcheck source=scripts/venv.sh
source "$root/scripts/venv.sh" train
exec "$PY" -m smartmoe.hosts.deepspeed_alpa.launch "$@"
