"""The ways of placing experts that a replay compares, each a layer of its own, and the tokens that all of them get."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from smartmoe.bench import routing as routings
from smartmoe.bench.measure import World
from smartmoe.bench.replay_layer import ReplayedLayer
from smartmoe.bench.shapes import Shape
from smartmoe.config import LayerConfig, OnlineConfig, RunConfig
from smartmoe.gates import Routing
from smartmoe.layer import MoELayer
from smartmoe.load_map import fullest_over_mean

NUM_WARMUP_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Mode:
    """One way of placing experts. `layer` None: as --dispatcher says; `forced`: how tokens are routed instead of as recorded,
    "even" or "uniform"."""

    about: str
    online: OnlineConfig = OnlineConfig()
    layer: LayerConfig | None = None
    forced: str | None = None


MODES = {
    "even": Mode(about="force-balanced, the stricter way: every expert gets exactly as many tokens; nothing moves",
                 forced="even"),
    "uniform": Mode(about="force-balanced as Megatron's --moe-router-force-load-balancing: experts drawn uniformly at random; "
                    "nothing moves", forced="uniform"),
    "static": Mode(about="experts in order, nothing moves"),
    "every_100": Mode(about="greedy placement every 100 iterations", online=OnlineConfig(policy="greedy", interval=100)),
    "every_10": Mode(about="greedy placement every 10 iterations", online=OnlineConfig(policy="greedy", interval=10)),
    "history": Mode(about="copies of hot experts from history, decided every 10 iterations; owners stay",
                    online=OnlineConfig(policy="auto", migrate=False, replicate="history", interval=10)),
    "both": Mode(about="owners move and copies are made from history, whichever pays, decided every 10 iterations",
                 online=OnlineConfig(policy="auto", replicate="history", interval=10)),
    "exact": Mode(about="copies of hot experts for each micro-batch, from its own counts; owners stay",
                  online=OnlineConfig(replicate="exact")),
    "both_exact": Mode(about="owners move where it pays, decided every 10 iterations; exact copies take the rest",
                       online=OnlineConfig(policy="auto", replicate="exact", interval=10)),
    "shadowing": Mode(about="FasterMoE: overlapped exchange, hot experts' weights sent to all ranks (grouped GEMM)",
                      layer=LayerConfig(dispatcher="overlapped", shadowing=True)),
}  # fmt: skip


class FixedGate(nn.Module):
    """A gate that routes as it was told last."""

    def __init__(self):
        super().__init__()
        self.routing: Routing | None = None

    def set_placement(self, *_) -> None:
        pass

    def forward(self, x_TD, token_id_T, num_segments=1) -> Routing:
        return self.routing


class _NoInit(torch.overrides.TorchFunctionMode):
    """Leaves out drawing initial weights on the host and bringing them over: that takes longer than the measurement."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        is_copy = func is torch.Tensor.copy_ and args[1].is_floating_point()
        return args[0] if is_copy or func is torch.Tensor.normal_ else func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Step:
    """What one step left: marks before it, before the decision and after; events; whether the host was behind."""

    marks: list
    events: list[dict]
    is_late: bool

    def parts_ms(self) -> tuple[float, float]:
        """(the work, what came after it); to be read when the device is done."""
        work, after = (_elapsed_ms(a, b) for a, b in zip(self.marks[:-1], self.marks[1:], strict=True))
        return work, after


class Player:
    """One mode: a layer of its own, and how it plays an iteration."""

    def __init__(self, mode: Mode, config: RunConfig, online: OnlineConfig, tokens: Tokens):
        self.mode, self.tokens, self.world = mode, tokens, tokens.world
        group, device = self.world.group, self.world.device
        dtype = getattr(torch, config.workload.dtype)
        with _NoInit():
            layer = MoELayer(config, layer_idx=0, ep_group=group, stage_group=group, dtype=dtype, device=device)
        layer.gate = FixedGate()
        generator = torch.Generator(device).manual_seed(config.workload.seed + self.world.ep_rank)
        with torch.no_grad():
            for weight in layer.experts.parameters():
                weight.normal_(0.0, weight.shape[-2] ** -0.5 if weight.dim() == 3 else 0.02, generator=generator)
        self.replayed = ReplayedLayer(layer, group, group, online, tokens.num_micro_batches)
        for _ in range(NUM_WARMUP_STEPS):
            self.step()
        self.replayed.start_deciding()

    def step(self, number: int = 0, lead_cycles: int = 0) -> Step:
        """One training step, the one numbered `number` for those who decide. Collective."""
        if lead_cycles and self.world.device.type == "cuda":
            torch.cuda._sleep(lead_cycles)
        self.world.align()
        marks = [_mark(self.world)]
        self.replayed.begin_step()
        for micro in range(self.tokens.num_micro_batches):
            self.replayed.layer.gate.routing = self.tokens.routing(micro, self.mode.forced)
            token_id_BT = self.tokens.token_id_BT + micro * self.tokens.token_id_BT.shape[1]
            self.result = self.replayed.work(self.tokens.x_BTD, token_id_BT, self.tokens.grad_BTD)
        self.replayed.end_step()
        marks.append(_mark(self.world))
        is_late = self.world.device.type == "cuda" and marks[0].query()  # what comes now waits for the device
        self.replayed.prepare(number)
        events = self.replayed.after_step(number)
        marks.append(_mark(self.world))
        self.replayed.drop_gradients()
        self.tokens.weight_TK.grad = None
        return Step(marks, events, is_late)

    def load_max_over_mean(self) -> float:
        """Fullest rank over mean rank in the iteration at hand, with experts where they are now; mean of micro-batches."""
        count_MSE = self.tokens.count_MSE(self.mode.forced)
        return float(np.mean([fullest_over_mean(self.replayed.rank_load(count_SE[None])) for count_SE in count_MSE]))


def _mark(world: World):
    if world.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed_ms(start, end) -> float:
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)


class Tokens:
    """The tokens that all modes share, and how the iteration at hand routes them."""

    def __init__(self, shape: Shape, world: World, dtype: torch.dtype, seed: int, num_micro_batches: int):
        self.shape, self.world, self.seed, self.num_micro_batches = shape, world, seed, num_micro_batches
        generator = torch.Generator(world.device).manual_seed(seed + world.ep_rank)
        draw = lambda *size, **how: torch.randn(*size, generator=generator, device=world.device, **how)  # noqa: E731
        self.x_BTD, self.grad_BTD = draw(2, 1, shape.num_tokens, shape.width, dtype=dtype)
        self.weight_TK = draw(shape.num_tokens, shape.top_k).softmax(1).requires_grad_()
        first = world.ep_rank * shape.num_tokens * num_micro_batches
        self.token_id_BT = torch.arange(first, first + shape.num_tokens, device=world.device)[None]
        self.zero = torch.zeros((), device=world.device)
        even_E = np.ones(shape.num_experts, np.int64)
        drawn_M = [self._draw(even_E, micro, num_micro_batches) for micro in range(num_micro_batches)]
        count_E = routings.capped(even_E, shape.num_tokens, shape.top_k)
        count_MSE = np.broadcast_to(count_E, (num_micro_batches, world.num_ranks, shape.num_experts))
        # how each micro-batch is routed, [T, K], and the counts of all ranks, [M, W, E]: as recorded (None), or forced
        self._routed = {forced: (drawn_M, count_MSE) for forced in (None, "even", "uniform")}

    def set_iteration(self, counts_RME: np.ndarray, row: int) -> None:
        """Route as a recorded iteration from now on. counts_RME: of all ranks and micro-batches of the trace."""
        shape, num_ranks = self.shape, self.world.num_ranks
        rank_S, micro_M = (np.arange(num) % size for num, size in
                           zip((num_ranks, self.num_micro_batches), counts_RME.shape, strict=False))  # fmt: skip
        counts_SME = counts_RME[rank_S][:, micro_M]
        count_MSE = np.array([
            [routings.capped(count_E, shape.num_tokens, shape.top_k) for count_E in counts_SE]
            for counts_SE in counts_SME.swapaxes(0, 1)
        ])  # fmt: skip
        mine_ME = counts_SME[self.world.ep_rank]
        self._routed[None] = [self._draw(count_E, row, micro) for micro, count_E in enumerate(mine_ME)], count_MSE
        self._routed["uniform"] = self._draw_uniform(row)

    def routing(self, micro: int, forced: str | None = None) -> Routing:
        return Routing(self._routed[forced][0][micro], self.weight_TK, self.zero)

    def count_MSE(self, forced: str | None = None) -> np.ndarray:
        """[M, W, E] token copies of each expert on each rank."""
        return self._routed[forced][1]

    def _draw(self, count_E: np.ndarray, *seed: int) -> torch.Tensor:
        seed = (self.seed, self.world.ep_rank, *seed)
        drawn_TK = _assign(tuple(count_E.tolist()), self.shape.num_tokens, self.shape.top_k, seed)
        return torch.from_numpy(drawn_TK).to(self.world.device)

    def _draw_uniform(self, row: int) -> tuple[list[torch.Tensor], np.ndarray]:
        """As a router whose scores are noise, which is what Megatron's flag makes of it; other noise in each iteration."""
        shape, generator = self.shape, torch.Generator(self.world.device)
        mine_M, count_MSE = [], []
        for micro in range(self.num_micro_batches):
            count_SE = []
            for source in range(self.world.num_ranks):  # every rank draws for all, to know the counts
                generator.manual_seed(hash((self.seed, row, micro, source)))
                score_TE = torch.rand(
                    shape.num_tokens, shape.num_experts, generator=generator, device=self.world.device
                )
                drawn_TK = score_TE.topk(shape.top_k).indices
                count_SE.append(torch.bincount(drawn_TK.flatten(), minlength=shape.num_experts).cpu().numpy())
                if source == self.world.ep_rank:
                    mine_M.append(drawn_TK)
            count_MSE.append(count_SE)
        return mine_M, np.array(count_MSE)


@functools.cache  # shapes of equal T and K share a trace
def _assign(count_E: tuple[int, ...], num_tokens: int, top_k: int, seed: tuple[int, ...]) -> np.ndarray:
    return routings.assign(np.array(count_E), num_tokens, top_k, np.random.default_rng(seed))
