#!/usr/bin/env bash
# Run a small MoE layer, forward and backward, under compute-sanitizer, and the direct exchange of two ranks that share the GPU.
# One GPU, the first that is visible: with a GPU for each rank, and so NCCL, the planted error alone took more than two minutes.
# First an error is planted in a rank, which must be reported: it shows that the processes of ranks are watched.
# The arguments are its tools (memcheck, racecheck, synccheck, initcheck); default: memcheck racecheck. Any report fails.
# After both without one, tests/sanitized.json, to be committed, says of which sources.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
sanitizer="$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")"
[ -x "$sanitizer" ] || { echo "sanitize.sh: compute-sanitizer was not found; it comes with the CUDA toolkit" >&2; exit 2; }
if [ -z "${PY:-}" ]; then
  # shellcheck source=scripts/venv.sh
  source scripts/venv.sh test
fi
# each tensor is an allocation of its own, so that a step over its end is seen
export PYTHONPATH="src:.${PYTHONPATH:+:$PYTHONPATH}" PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=1
[ $# -gt 0 ] || set -- memcheck racecheck
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES:-0}"
export CUDA_VISIBLE_DEVICES="${CUDA_VISIBLE_DEVICES%%,*}"
logs="$(mktemp -d)"
trap 'rm -rf "$logs"' EXIT
failed=0
sanitize() { # tool, command
  local -a options=()
  # torch asks the driver for memory of a kind that not every machine grants, in order to learn whether it does: a call that
  # fails is no fault of a kernel, and one that matters raises in the program, whose exit code counts
  if [ "$1" = memcheck ]; then options=(--report-api-errors no); fi
  "$sanitizer" --tool "$1" ${options[@]+"${options[@]}"} --target-processes all --require-cuda-init no --error-exitcode 9 \
    --log-file "$logs/log" "${@:2}" >"$logs/rows" 2>"$logs/errors" || { failed=1; tail -n 20 "$logs/errors"; }
  cat "$logs/rows" "$logs/log"
  grep -q SUMMARY "$logs/log" || failed=1
}
echo "== an error that the second of two ranks makes on purpose"
"$sanitizer" --tool memcheck --target-processes all --require-cuda-init no --log-file "$logs/log" \
  "$PY" -m tests.dispatch.small_world planted >"$logs/rows" 2>"$logs/errors" || true
if grep -q "Invalid __global__ write" "$logs/log" && grep -q announce_kernel "$logs/log"; then
  echo "reported: $(grep -c "Invalid __global__ write" "$logs/log") writes"
else
  failed=1
  echo "sanitize.sh: it was not reported, so the ranks are not watched" >&2
  tail -n 20 "$logs/log" "$logs/errors" >&2
fi
for tool in "$@"; do
  echo "== $tool, exchange of two ranks"
  sanitize "$tool" "$PY" -m tests.dispatch.small_world
  [ "$(grep -c exchanged "$logs/rows")" = 2 ] || failed=1
  echo "== $tool, layers"
  sanitize "$tool" "$PY" -m torch.distributed.run --standalone --nproc-per-node 1 -m smartmoe.bench.layer --bias \
    --device cuda --dispatchers basic padded direct --shapes 99,64,32,8,3 60,64,32,8,2,swiglu --warmup 1 --iterations 1
  [ "$(grep -c ' balanced .* [0-9.]* (' "$logs/rows")" = 6 ] || failed=1
done
[ "$failed" = 0 ] || { echo "sanitize.sh: see the reports above" >&2; exit 1; }
"$PY" -m tests.sanitized "$@"  # tests/sanitized.json: a test marked gpu holds that kernels are as they were here
