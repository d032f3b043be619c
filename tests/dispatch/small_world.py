"""Two ranks, on two GPUs or sharing one, run a small exchange with and without copies of experts, forward and backward: what
scripts/sanitize.sh watches.  python -m tests.dispatch.small_world"""

import torch

from tests.dispatch import test_direct, test_symmetric_replicas
from tests.dist import SHARED_GPU, spawn


def run(world_rank, num_ranks):
    test_direct._interleave(world_rank, num_ranks, "cuda")
    test_symmetric_replicas._balanced(world_rank, num_ranks)
    print(f"rank {world_rank}: exchanged", flush=True)


if __name__ == "__main__":
    spawn(run, 2, 2, backend="nccl" if torch.cuda.device_count() > 1 else SHARED_GPU)
