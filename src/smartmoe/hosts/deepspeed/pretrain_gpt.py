"""Train the GPT of RUN_DIR/run.json with DeepSpeed's engine and DeepSpeed's own MoE layer:

    torchrun --nproc-per-node N -m smartmoe.hosts.deepspeed.pretrain_gpt RUN_DIR

The run directory, the model, its initial weights, the text and the learning rates are those of `smartmoe.train`; who takes
the micro-batch through experts, who reduces gradients, clips and steps is DeepSpeed. The gates: "naive" is top-k without a
balance loss; "gshard" draws the second expert and has GShard's balance loss, DeepSpeed's own top-2; "switch" is its top-1.
The capacity is per rank and micro-batch. workload.zero is the ZeRO stage, workload.dtype the engine's precision: in bfloat16
and float16 it sums gradients of micro-batches in that type, DeepSpeed's default, where SmartMoE's trainer does in float32.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist

from smartmoe import record
from smartmoe.blocks import init_weights
from smartmoe.config import RunConfig, Workload, check, from_dict
from smartmoe.data import TokenDataset, load_tokens
from smartmoe.gpt import GPT
from smartmoe.hosts.deepspeed.engine import init_world, make_engine, split_groups, zero_config
from smartmoe.hosts.deepspeed.limits import problems
from smartmoe.hosts.deepspeed.moe import DeepSpeedMoE
from smartmoe.hosts.deepspeed.text import micro_batch
from smartmoe.optimizer import StepResult, learning_rate
from smartmoe.run_log import Progress, write_iteration
from smartmoe.train import fail, own_device
from smartmoe.trainer import IterationResult


def main(argv: list[str] | None = None, stay: bool = False) -> int:
    """stay: other runs follow in this process and its world."""
    parser = argparse.ArgumentParser(
        prog="python -m smartmoe.hosts.deepspeed.pretrain_gpt", description="Train a run with DeepSpeed."
    )
    parser.add_argument("run_dir", type=Path, help="directory with run.json, whose config is trained")
    parser.add_argument("--cache", type=Path, default=None, help="where tokenised text is kept (default: .cache/smartmoe)")
    args = parser.parse_args(argv)
    world_rank = int(os.environ.get("RANK", "0"))
    try:
        _run(args)
    except Exception as error:
        fail(args.run_dir, world_rank, error)
    if not stay:
        dist.barrier()
        dist.destroy_process_group()
    return 0


def _run(args: argparse.Namespace) -> None:
    run = record.read_run(args.run_dir)
    config = check(from_dict(RunConfig, run["config"], f"{args.run_dir}/run.json: config"), str(args.run_dir))
    if refused := problems(config):
        raise ValueError(f"{args.run_dir}: DeepSpeed cannot do this run: " + "; ".join(refused))
    deepspeed.utils.logger.setLevel(logging.WARNING)
    device = start_world(config)
    extra = {} if args.cache is None else {"cache_dir": args.cache}
    tokens = load_tokens(config.workload.data, config.model.vocab_size, seed=config.workload.seed, **extra)
    trainer = DeepSpeedTrainer(config, tokens, device)
    writer = record.RunWriter(args.run_dir) if dist.get_rank() == 0 else None
    progress = Progress(config, 0)
    if writer:
        writer.log(progress.opening(config))
        print(progress.opening(config), flush=True)
    while trainer.iteration < config.workload.iterations:
        result = trainer.run_iteration()
        if writer:
            write_iteration(writer, config, result, progress)
    if writer:
        writer.close()
    trainer.engine.destroy()  # its hooks on gradients keep model and optimizer alive, beside the next run of this process


def start_world(config: RunConfig) -> torch.device:
    """Join the world that torchrun started and return this rank's device. Raises ValueError when GPUs or ranks lack."""
    if "LOCAL_RANK" not in os.environ:
        raise ValueError(f"{config.plan.describe()}: start it with torchrun, also for one rank")
    device = own_device(config.cluster.device)
    init_world("nccl" if device.type == "cuda" else "gloo")
    if dist.get_world_size() != config.plan.world_size:
        raise ValueError(
            f"{config.plan.describe()} needs {config.plan.world_size} ranks, but {dist.get_world_size()} were started"
        )
    return device


def engine_config(config: RunConfig) -> dict:
    """DeepSpeed's configuration of a run. Losses scale in fp16 as in `smartmoe.optimizer`: halved at each overflow, doubled
    after 1000 steps without one."""
    work = config.workload
    table = {
        "train_micro_batch_size_per_gpu": work.micro_batch_size,
        "gradient_accumulation_steps": config.num_micro_batches,
        "gradient_clipping": work.clip_grad,
        "steps_per_print": 1_000_000_000,
        "timers": {"throughput": {"enabled": False}},  # it makes the host wait for the GPU in each micro-batch
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero_config(work.zero),
    }
    if work.dtype == "float16":
        table["fp16"] = {
            "enabled": True, "loss_scale": 0, "initial_scale_power": int(math.log2(work.initial_loss_scale)),
            "loss_scale_window": 1000, "hysteresis": 1, "min_loss_scale": 1,
        }  # fmt: skip
    elif work.dtype == "bfloat16":
        table["bf16"] = {"enabled": True}
    return table


def make_optimizer(model: torch.nn.Module, work: Workload) -> torch.optim.Optimizer:
    """The AdamW of `smartmoe.optimizer`, matrices decayed and vectors not, in groups that DeepSpeed knows. Call it once."""
    params = [param for param in model.parameters() if param.requires_grad]
    groups = split_groups(
        [
            {"name": "matrices", "params": [p for p in params if p.dim() > 1], "weight_decay": work.weight_decay},
            {"name": "vectors", "params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
        ]
    )
    return torch.optim.AdamW(
        groups, lr=work.lr, betas=(work.adam_beta1, work.adam_beta2), eps=work.adam_eps, fused=True
    )


class DeepSpeedTrainer:
    """Model, engine and text of `config` on this rank. Building it is collective over the world."""

    def __init__(self, config: RunConfig, tokens: TokenDataset, device: torch.device):
        self.config, self.tokens, self.device = config, tokens, device
        self.iteration = 0
        self.layers: dict[int, DeepSpeedMoE] = {}
        model = GPT(config.model, self._make_moe, recompute=config.plan.recompute)
        init_weights(model, config.workload.seed, config.model.num_layers)
        model.to(device)
        self.optimizer = make_optimizer(model, config.workload)
        self.engine = make_engine(model, self.optimizer, engine_config(config))
        # DeepSpeed draws from torch's generator: other noise on every rank
        torch.manual_seed(config.workload.seed + dist.get_rank())

    def _make_moe(self, layer_idx: int) -> DeepSpeedMoE:
        gate = self.config.gate
        self.layers[layer_idx] = DeepSpeedMoE(
            self.config, layer_idx, capacity=gate.capacity, sample=gate.kind == "gshard", use_rts=True, device=self.device
        )
        return self.layers[layer_idx]

    def _batches(self) -> list[tuple[torch.Tensor, ...]]:
        """This rank's micro-batches of the next iteration: the samples that `smartmoe.trainer` gives to the same rank."""
        work, dp = self.config.workload, self.config.plan.dp
        first = self.iteration * work.global_batch_size + dist.get_rank() * work.micro_batch_size
        starts = [first + step * dp * work.micro_batch_size for step in range(self.config.num_micro_batches)]
        seq_len = self.config.model.seq_len
        return [
            micro_batch(self.tokens, range(start, start + work.micro_batch_size), seq_len, self.device)
            for start in starts
        ]

    def run_iteration(self) -> IterationResult:
        """Train on the next global batch. Collective over the world; synchronises with the host.

        `load_max_over_mean` is of the copies that tokens asked for, before a capacity drops any.
        """
        work, batches = self.config.workload, self._batches()
        lr, scale = learning_rate(work, self.iteration), self._loss_scale()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for layer in self.layers.values():
            layer.count_E.zero_()
        skipped_before, losses = self.engine.skipped_steps, torch.zeros(2, device=self.device)
        self._synchronise()
        dist.barrier()
        start = time.perf_counter()
        for batch in batches:
            losses += self._train_micro_batch(*batch)
        self._synchronise()
        step_ms = torch.tensor((time.perf_counter() - start) * 1e3, dtype=torch.float64, device=self.device)
        dist.all_reduce(step_ms, op=dist.ReduceOp.MAX)
        dist.all_reduce(losses)
        self.iteration += 1
        norm = self.engine.get_global_grad_norm()
        cross_entropy, balance_loss = losses.tolist()
        num_losses = self.config.num_micro_batches * self.config.plan.dp
        return IterationResult(
            iteration=self.iteration,
            step_ms=step_ms.item(),
            lm_loss=cross_entropy / (work.global_batch_size * self.config.model.seq_len),
            balance_loss=balance_loss / num_losses,
            optimizer=StepResult(
                grad_norm=math.nan if norm is None else float(norm),
                skipped=self.engine.skipped_steps > skipped_before,
                loss_scale=scale,
                lr=lr,
            ),
            load_max_over_mean=self._load_max_over_mean(),
            replica_bytes=0,
            events=[],
            stop_requested=False,
        )

    def _train_micro_batch(self, token_BT, target_BT, token_id_BT) -> torch.Tensor:
        """Forward, backward and, after the last micro-batch, the step: (summed cross-entropy, balance loss)."""
        cross_entropy, balance_loss = self.engine(token_BT, token_id_BT=token_id_BT, target_BT=target_BT)
        loss, balance_loss = cross_entropy / token_BT.numel(), balance_loss * (self.config.gate.kind != "naive")
        self.engine.backward((loss + self.config.gate.balance_weight * balance_loss).sum())
        self.engine.step()
        return torch.cat([cross_entropy.detach(), balance_loss.detach()])

    def _loss_scale(self) -> float:
        return float(self.engine.optimizer.cur_scale) if self.config.workload.dtype == "float16" else 1.0

    def _load_max_over_mean(self) -> float:
        """Fullest rank's load over the mean rank's, mean of the layers. Collective over the world."""
        if not self.layers:
            return 1.0
        count_LE = torch.stack([layer.count_E for layer in self.layers.values()])
        ep, num_layers = self.config.plan.ep, len(self.layers)
        groups_LGE = count_LE.new_zeros(num_layers, self.config.plan.dp // ep, count_LE.shape[1])
        groups_LGE[:, dist.get_rank() // ep] = count_LE
        dist.all_reduce(groups_LGE)
        load_LW = groups_LGE.view(num_layers, -1, count_LE.shape[1] // ep).sum(-1).double()
        return (load_LW.amax(1) / load_LW.mean(1)).mean().item()

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


if __name__ == "__main__":
    sys.exit(main())
