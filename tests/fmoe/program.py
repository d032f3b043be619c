"""A program written for FastMoE: a small transformer whose MLPs have experts, on as many workers as torchrun starts.

torchrun --nproc-per-node 2 tests/fmoe/program.py: prints the loss of every fifth step and a fingerprint of what all share.
"""

import torch
import torch.distributed as dist
from torch import nn

import fmoe
from fmoe.gates import GShardGate


class Block(nn.Module):
    def __init__(self, width, workers):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = fmoe.FMoETransformerMLP(
            num_expert=2, d_model=width, d_hidden=2 * width, world_size=workers, activation=nn.GELU(), gate=GShardGate, top_k=2
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x):
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


def main():
    dist.init_process_group("gloo")
    rank, workers = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    model = nn.Sequential(nn.Embedding(16, 16), Block(16, workers), Block(16, workers), nn.Linear(16, 16))
    model = fmoe.DistributedGroupedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(31):
        start = torch.randint(16, (8, 1), generator=torch.Generator().manual_seed(step * workers + rank))
        tokens = (start + 3 * torch.arange(9)) % 16
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        balance = sum(gate.get_loss() for gate in model.modules() if getattr(gate, "has_loss", False))
        optimizer.zero_grad()
        (loss + 0.01 * balance).backward()
        model.allreduce_params()
        optimizer.step()
        dist.all_reduce(loss.detach_())
        if rank == 0 and step % 5 == 0:
            print(f"step {step}: loss {loss.item() / workers:.4f}", flush=True)
    shared = torch.cat([param.detach().flatten() for param in model.parameters() if getattr(param, "dp_comm", "dp") != "none"])
    every = [torch.empty_like(shared) for _ in range(workers)]
    dist.all_gather(every, shared)
    if rank == 0:
        print("shared parameters are equal:", all(torch.equal(part, shared) for part in every))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
