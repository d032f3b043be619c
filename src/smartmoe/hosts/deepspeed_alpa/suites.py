"""What the benchmark runs: models, suites of cases by number of GPUs, parameter counts and FLOPs. Never imports torch.

The models, cases and formulas are those of the benchmark of Alpa's artifact (github.com/alpa-projects/alpa, branch
osdi22_artifact; Zheng et al., OSDI'22). B sequences of S tokens make one iteration, H is the hidden size, V the
vocabulary, E experts, G tokens gate together ("group").
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, replace

from smartmoe.hosts.deepspeed.limits import MIN_CAPACITY

FFN_FACTOR = 8
TOP_K = 2
ALPA_GROUP = 2048
RECOMPUTE_FACTOR = 4
NO_RECOMPUTE_FACTOR = 3


@dataclass(frozen=True, kw_only=True)
class MoEModel:
    """A GShard/GSPMD transformer: odd layers (from 0) have top-2 experts of width 8H, even ones one such MLP."""

    name: str
    hidden_size: int
    num_layers: int
    num_experts: int
    num_heads: int = 16
    seq_len: int = 1024
    vocab_size: int = 32000

    @property
    def ffn_size(self) -> int:
        return FFN_FACTOR * self.hidden_size


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of a suite: `model` on `num_gpus` data-parallel ranks, experts over runs of `ep` of them, `batch_size`
    sequences an iteration in `num_micro_batches` steps of every rank."""

    model: MoEModel
    num_gpus: int
    num_micro_batches: int
    ep: int
    batch_size: int = 1024

    @property
    def micro_batch_size(self) -> int:
        """Sequences of one rank and one micro-step."""
        return self.batch_size // (self.num_gpus * self.num_micro_batches)

    @property
    def tokens(self) -> int:
        """Tokens of an iteration."""
        return self.batch_size * self.model.seq_len

    @property
    def group_size(self) -> int:
        """Tokens that gate together in DeepSpeed: all of one rank's micro-batch, whatever Alpa's case says."""
        return self.micro_batch_size * self.model.seq_len

    @property
    def expert_dp(self) -> int:
        return self.num_gpus // self.ep

    @property
    def experts_per_rank(self) -> int:
        return self.model.num_experts // self.ep

    @property
    def capacity(self) -> int:
        """Seats of one expert for one rank's micro-batch: 2 G / E."""
        return max(math.ceil(TOP_K * self.group_size / self.model.num_experts), MIN_CAPACITY)


def _models(*rows: tuple) -> dict[str, MoEModel]:
    keys = ("name", "hidden_size", "num_layers", "num_experts")
    return {row[0]: MoEModel(**dict(zip(keys, row, strict=True))) for row in rows}


_TINY = MoEModel(
    name="tiny", hidden_size=32, num_layers=4, num_experts=4, num_heads=4, seq_len=32, vocab_size=320
)
MODELS = _models(
    ("380M", 768, 8, 8),
    ("690M", 768, 8, 16),
    ("1.3B", 768, 16, 16),
    ("2.4B", 1024, 16, 16),
    ("4.5B", 1024, 16, 32),
    ("7.1B", 1280, 16, 32),
    ("10B", 1536, 16, 32),
    ("27B", 2048, 16, 48),
    ("70B", 2048, 32, 64),
    ("140B", 2048, 32, 128),
) | {"tiny": _TINY}


def _suite(*rows: tuple[int, str, int, int], batch_size: int = 1024) -> dict[int, Case]:
    return {
        num_gpus: Case(
            model=MODELS[name], num_gpus=num_gpus, num_micro_batches=micro_batches, ep=ep, batch_size=batch_size
        )
        for num_gpus, name, micro_batches, ep in rows
    }


# GPUs, model, micro-batches, ep. "artifact" is what the submitted script runs, "paper" what its first version ran and the
# published numbers stand for: they differ from 8 GPUs on. The script has no row for 2 GPUs (this one is from Alpa's own
# manual suite) and none for 64, where the published run failed (this one keeps 32 GPUs' micro-batch and ep).
_SMALL = ((1, "380M", 128, 1), (2, "690M", 64, 2), (4, "1.3B", 32, 4))
SUITES: dict[str, dict[int, Case]] = {
    "artifact": _suite(*_SMALL, (8, "2.4B", 16, 2), (16, "4.5B", 8, 8), (32, "10B", 8, 8), (64, "70B", 4, 8)),
    "paper": _suite(*_SMALL, (8, "2.4B", 16, 4), (16, "10B", 8, 8), (32, "27B", 8, 8), (64, "70B", 4, 8)),
    "tiny": _suite((1, "tiny", 2, 1), (2, "tiny", 2, 2), (4, "tiny", 2, 4), batch_size=16),
}
NUM_GPUS = (1, 2, 4, 8, 16, 32, 64)


def find_case(
    suite: str,
    num_gpus: int,
    *,
    model: str | None = None,
    ep: int | None = None,
    num_micro_batches: int | None = None,
    batch_size: int | None = None,
) -> Case:
    """The case of `suite` for `num_gpus`, with what is given changed.

    Raises ValueError when there is no such suite, case or model, or when sizes do not divide.
    """
    if suite not in SUITES:
        raise ValueError(f'suite "{suite}" is not one of {", ".join(SUITES)}')
    if num_gpus not in SUITES[suite]:
        raise ValueError(
            f"suite {suite} has no case for {num_gpus} GPUs, only for {', '.join(map(str, SUITES[suite]))}"
        )
    if model is not None and model not in MODELS:
        near = difflib.get_close_matches(model, MODELS, n=1)
        raise ValueError(
            f'model "{model}" is not one of {", ".join(MODELS)}' + (f'; did you mean "{near[0]}"?' if near else "")
        )
    changes = {"ep": ep, "num_micro_batches": num_micro_batches, "batch_size": batch_size}
    changes = {key: value for key, value in changes.items() if value is not None}
    if model is not None:
        changes["model"] = MODELS[model]
    return check(replace(SUITES[suite][num_gpus], **changes))


def check(case: Case) -> Case:
    """Return `case` unchanged, or raise ValueError that says which size does not divide and how to mend it."""
    model, problems = case.model, []
    for key in ("num_gpus", "num_micro_batches", "ep", "batch_size"):
        if getattr(case, key) < 1:
            raise ValueError(f"{key} = {getattr(case, key)} must be at least 1")
    if case.num_gpus % case.ep:
        problems.append(f"ep = {case.ep} does not divide the {case.num_gpus} ranks")
    if model.num_experts % case.ep:
        problems.append(f"ep = {case.ep} does not divide the {model.num_experts} experts of {model.name}")
    if case.batch_size % (case.num_gpus * case.num_micro_batches):
        problems.append(
            f"a batch of {case.batch_size} sequences does not divide among {case.num_gpus} ranks x "
            f"{case.num_micro_batches} micro-batches"
        )
    if problems:
        raise ValueError("; ".join(problems))
    return case


# -------------------------------------------------------------------------------------------------- the formulas


def parameter_count(model: MoEModel) -> int:
    """Parameters by Alpa's formula: without routers, position embeddings and the last norm, embeddings tied; the three
    biases of query, key and value count as one, and every word of the vocabulary has one number more than there is."""
    hidden = model.hidden_size
    attention_and_norms = 4 * hidden**2 + 2 * hidden + 4 * hidden
    expert = 2 * FFN_FACTOR * hidden**2 + (FFN_FACTOR + 1) * hidden
    layers = model.num_layers * attention_and_norms + model.num_layers // 2 * (1 + model.num_experts) * expert
    return layers + model.vocab_size * (hidden + 1)


def iteration_flops(
    model: MoEModel, batch_size: int, group_size: int | None = ALPA_GROUP, factor: int = RECOMPUTE_FACTOR
) -> int:
    """FLOPs of one iteration by Alpa's formula.

    group_size: G of the gating and of the dispatch and combine einsums over a dense [G, E, C] mask; None leaves these
    terms out, which DeepSpeed 0.19.8 and SmartMoE do not compute. factor: 4 with recomputation, 3 without; the
    output logits are never recomputed. Attention is counted whole, not only its causal half.
    """
    hidden, layers = model.hidden_size, model.num_layers // 2
    tokens = batch_size * model.seq_len
    attention = 8 * tokens * hidden**2 + 4 * tokens * model.seq_len * hidden
    mlp = 4 * FFN_FACTOR * tokens * hidden**2
    router = 2 * tokens * hidden * model.num_experts
    group = 0 if group_size is None else 4 * tokens * group_size + 8 * tokens * hidden * group_size
    forward = layers * (2 * attention + mlp + TOP_K * mlp + router + group)
    return factor * forward + 6 * tokens * hidden * model.vocab_size


def tflops(case: Case, seconds: float) -> dict[str, float]:
    """TFLOP/s of one GPU for an iteration of `seconds`, in three counts.

    "alpa": groups of at most 2048 tokens, as Alpa counts itself. "artifact": groups of all tokens of a micro-batch, as
    the artifact counts DeepSpeed (it credits more work for the same step). "useful": no group terms, no recomputation.
    """
    model, batch = case.model, case.batch_size
    flops = {
        "alpa": iteration_flops(model, batch, min(ALPA_GROUP, case.group_size)),
        "artifact": iteration_flops(model, batch, case.group_size),
        "useful": iteration_flops(model, batch, None, NO_RECOMPUTE_FACTOR),
    }
    return {name: count / seconds / case.num_gpus / 1e12 for name, count in flops.items()}
