"""Two ranks, on two GPUs or sharing one, run a small exchange with and without copies of experts, forward and backward: what
scripts/sanitize.sh watches.  python -m tests.dispatch.small_world

python -m tests.dispatch.small_world planted: the second rank writes past the end of a tensor instead, which a sanitizer that
watches the ranks reports."""

import sys

import torch

from smartmoe.dispatch import direct
from tests.dispatch import test_direct, test_symmetric_replicas
from tests.dist import SHARED_GPU, gpu_of, spawn


def run(world_rank, num_ranks):
    for early in (False, True):
        direct._TRANSPORTS.clear()
        test_direct._interleave(world_rank, num_ranks, "cuda", early)
    test_symmetric_replicas._balanced(world_rank, num_ranks)
    print(f"rank {world_rank}: exchanged", flush=True)


def plant(world_rank):
    from smartmoe.dispatch.direct_kernels import announce_kernel

    if world_rank == 1:
        slot, room_for_one = (torch.zeros(num, dtype=torch.int64, device=gpu_of(world_rank)) for num in (1024, 1))
        weight, weight_out = (torch.zeros(1024, device=gpu_of(world_rank)) for _ in range(2))
        odd, state = (torch.zeros(3, dtype=torch.int32, device=gpu_of(world_rank)) for _ in range(2))
        announce_kernel[(1,)](
            slot, weight, room_for_one, weight_out, odd, slot, state, 0, 1024, 1024, 1, 0, W=1, BLOCK=1024, EARLY=False
        )  # fmt: skip
        torch.cuda.synchronize()


if __name__ == "__main__":
    backend = "nccl" if torch.cuda.device_count() > 1 else SHARED_GPU
    if "planted" in sys.argv:
        spawn(plant, 2, backend=backend, fresh=True)
    else:
        spawn(run, 2, 2, backend=backend, fresh=True)
