"""What a rank holds of a model under a plan: which layers, and how many parameters of which kind."""

from __future__ import annotations

from dataclasses import dataclass, replace

from smartmoe.config import ModelConfig, ParallelPlan, expert_numel


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters on one rank: by who shares them, how many tensors, and what is float32 anyway. largest,
    largest_expert: of one tensor, not of experts and of them."""

    dense: float = 0.0
    tensor: float = 0.0
    expert: float = 0.0
    router: float = 0.0  # part of dense
    largest: float = 0.0
    largest_expert: float = 0.0
    tensors: int = 0
    expert_tensors: int = 0  # part of tensors

    @property
    def total(self) -> float:
        return self.dense + self.tensor + self.expert

    def without_experts(self) -> Parameters:
        return replace(self, expert=0.0, tensors=self.tensors - self.expert_tensors, expert_tensors=0)

    def shared_out(self, plan: ParallelPlan) -> Parameters:
        """The part of a rank when those who share a parameter deal it out."""
        parts = {"dense": plan.stage_size, "tensor": plan.dp, "expert": plan.expert_dp, "router": plan.stage_size}
        return replace(self, **{kind: getattr(self, kind) / num for kind, num in parts.items()})

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(  # field by field: a search adds them up hundreds of thousands of times
            self.dense + other.dense, self.tensor + other.tensor, self.expert + other.expert, self.router + other.router,
            max(self.largest, other.largest), max(self.largest_expert, other.largest_expert),
            self.tensors + other.tensors, self.expert_tensors + other.expert_tensors,
        )  # fmt: skip


def chunk_layers(num_layers: int, num_chunks: int) -> list[range]:
    """Layers of each model chunk, as the trainer deals them out: the first chunks get one more."""
    base, extra = divmod(num_layers, num_chunks)
    starts = [chunk * base + min(chunk, extra) for chunk in range(num_chunks + 1)]
    return [range(a, b) for a, b in zip(starts[:-1], starts[1:], strict=True)]


def has_experts(model: ModelConfig, layer: int) -> bool:
    return layer % model.moe_every == model.moe_every - 1


def chunk_parameters(model: ModelConfig, plan: ParallelPlan, layers: range) -> Parameters:
    """What one rank holds of a chunk."""
    num_moe = sum(has_experts(model, layer) for layer in layers)
    total = Parameters()
    for parameters, times in (
        (block_parameters(model, plan, True), num_moe),
        (block_parameters(model, plan, False), len(layers) - num_moe),
    ):
        for _ in range(times):
            total += parameters
    width = model.hidden_size
    if layers[0] == 0:
        total += Parameters(
            dense=(model.vocab_size + model.seq_len) * width, largest=model.vocab_size * width, tensors=2
        )
    if layers[-1] == model.num_layers - 1:
        total += Parameters(dense=model.vocab_size * width + 2 * width, largest=model.vocab_size * width, tensors=3)
    return total


def block_parameters(model: ModelConfig, plan: ParallelPlan, with_experts: bool) -> Parameters:
    """What one rank holds of a block."""
    width, ffn = model.hidden_size, model.ffn_size
    attention = 4 * width * width / plan.tp
    norms = Parameters(dense=4 * width, tensors=4)
    sliced = attention if with_experts else attention + 2 * width * ffn / plan.tp
    num_sliced = 2 if with_experts else 4
    key = "tensor" if plan.tp > 1 else "dense"
    total = norms + Parameters(**{key: sliced}, largest=3 * width * width / plan.tp, tensors=num_sliced)
    if not with_experts:
        return total
    router = model.num_experts * (width + 1)
    wide = hidden_width(model)
    slots, num_expert = model.num_experts // plan.ep, 4 if model.expert_bias else 2
    return total + Parameters(
        dense=router, router=router, expert=slots * expert_numel(model),
        largest=router, largest_expert=slots * width * wide, tensors=2 + num_expert, expert_tensors=num_expert,
    )  # fmt: skip


def hidden_width(model: ModelConfig) -> int:
    """Numbers of a row between an expert's two products."""
    return model.ffn_size * (2 if model.activation == "swiglu" else 1)
