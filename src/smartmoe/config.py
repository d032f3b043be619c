"""Every input of a run as frozen dataclasses, and every check of sizes that needs no GPU.

Layer 0: never imports torch. A configuration comes from TOML or JSON; an unknown key
is an error that names the file, the key and the nearest known key.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

from smartmoe import swin_sizes
from smartmoe.swin_sizes import SwinConfig, block_sizes, has_experts

GATES = ("naive", "noisy", "switch", "gshard", "swipe", "faster", "zero", "trace")
DISPATCHERS = ("basic", "overlapped", "padded", "pipelined", "direct", "auto")
EQUAL_BLOCKS = ("padded", "pipelined")  # dispatchers that give every slot equally many rows
EXPERT_IMPLS = ("grouped", "loop", "batched")
OVERLAP_DEGREES = (0, 1, 2, 4, 8)
ONLINE_POLICIES = ("static", "greedy", "least_move", "auto")
REPLICATE_MODES = ("never", "history", "exact")
DTYPES = ("float32", "bfloat16", "float16")
CUDA_GRAPH = ("auto", "never")
SCOPES = ("global", "local")
ACTIVATIONS = ("gelu", "relu", "swiglu")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes of a GPT whose every `moe_every`-th block has an MoE layer instead of a dense MLP.

    With `swin` it is a Swin transformer: num_layers are the blocks of all stages, and hidden_size, ffn_size, num_heads and
    seq_len (patches of an image) those of the first stage; vocab_size has no meaning.
    """

    name: str = "custom"
    num_layers: int = 4
    hidden_size: int = 64
    ffn_size: int = 128
    num_heads: int = 4
    seq_len: int = 64
    vocab_size: int = 512
    num_experts: int = 8
    top_k: int = 2
    moe_every: int = 1
    activation: str = "gelu"
    expert_bias: bool = True
    swin: SwinConfig | None = None


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """How tokens choose experts.

    `capacity` c keeps at most ceil(c * tokens * top_k / num_experts) copies per expert and drops the rest; null = dropless.
    `scope` "global" takes capacity and balance statistics over all ranks of a pipeline stage (what one process would
    compute), "local" over the rank's own tokens (what FastMoE's artifact does: no communication).
    """

    kind: str = "naive"
    capacity: float | None = None
    scope: str = "global"
    balance_weight: float = 0.01
    trace: str | None = None
    outgoing_fraction: float = 0.4


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Which mechanism carries tokens to experts and back, and how experts are computed.

    `row_factor`: room for rows of a rank in dispatcher "direct", in multiples of what the fullest rank needed so far
    (an even share at least); as many as there are ranks has room for any routing from the start. "auto" is "direct"
    where the GPUs of a group are linked by NVLink, else, and where links are slowed down, "basic". `overlap_degree`: pieces
    of an exchange of "pipelined", 0 = as many as is fastest, tried out. `experts` "batched": for dispatchers of equal blocks.
    """

    dispatcher: str = "basic"
    experts: str = "grouped"
    overlap_groups: int = 2
    overlap_degree: int = 0
    shadowing: bool = False
    row_factor: float = 1.125


@dataclass(frozen=True, kw_only=True)
class OnlineConfig:
    """Online expert placement: the policy, and after how many iterations it is asked again.

    "greedy" and "least_move" place by the load of the iteration just done; "auto" decides by a decayed history, measured
    times and costs whether to keep, migrate (unless `migrate` is false), replicate or both, and takes a change back that
    measures worse. A change must make the fullest rank's load (with "auto" the layer's time) fall by more than the fraction
    `min_gain` (null: 0, with "auto" 0.02), and with "auto" gain what it costs within `horizon` iterations.
    `replicate`: experts get copies on other ranks "never", for whole steps from the load seen ("history"), or for each
    micro-batch from its own routing ("exact"); every rank has room for `replica_slots` copies in each layer. Who decides
    in "history" is policy "auto"; with "static", whoever calls layer.set_replicas. `return_early` lets the gradients of such
    copies travel during the backward pass, over a communicator of their own, instead of after it; where the dispatcher is
    "direct" on linked GPUs they always do.
    """

    policy: str = "static"
    interval: int = 10
    min_gain: float | None = None
    migrate: bool = True
    horizon: int = 50
    replicate: str = "never"
    replica_slots: int = 0
    return_early: bool = False


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained on, for how long, and with which optimizer. `data`: files of text, or of a Swin transformer a folder of
    images or "synthetic"; empty = the running Python's standard library, or Debian's dataset-fashion-mnist.

    `zero` 1: each of the ranks that share a parameter keeps fp32 masters and moments of a part of it (ZeRO stage 1); 2: sums
    of gradients, too, which are reduced in every backward pass; 3: weights, too, which passes gather block by block; 0: all
    of all. Experts with replicas keep their weights whole, in "history" their gradients, too. `reduce_early`: ranks sum
    gradients while the last backward passes run (not with `zero`, nor experts' with replicas); else after them.
    `cuda_graph`: the passes of a micro-batch are captured once and replayed where that is possible ("auto"; smartmoe.graphs
    says where), or "never".
    """

    global_batch_size: int = 16
    micro_batch_size: int = 2
    iterations: int = 20
    warmup_iterations: int = 3
    seed: int = 1234
    dtype: str = "float32"
    lr: float = 1e-3
    min_lr: float = 1e-4
    lr_warmup_iterations: int = 2
    weight_decay: float = 0.1
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    adam_eps: float = 1e-8
    clip_grad: float = 1.0
    zero: int = 0
    reduce_early: bool = False
    cuda_graph: str = "auto"
    initial_loss_scale: float = 65536.0
    data: tuple[str, ...] = ()
    checkpoint_interval: int = 0


@dataclass(frozen=True, kw_only=True)
class ParallelPlan:
    """A hybrid-parallel plan. World = pp * dp * tp; experts are spread over `ep` of the dp * tp ranks of a stage and
    replicated over the remaining factor, `expert_dp`. `vpp` is the number of model chunks per pipeline rank (interleaving)."""

    pp: int = 1
    vpp: int = 1
    dp: int = 1
    tp: int = 1
    ep: int = 1
    recompute: bool = False

    @property
    def world_size(self) -> int:
        return self.pp * self.dp * self.tp

    @property
    def stage_size(self) -> int:
        """Ranks of one pipeline stage."""
        return self.dp * self.tp

    @property
    def expert_dp(self) -> int:
        return self.stage_size // self.ep

    def describe(self) -> str:
        text = f"pp{self.pp} dp{self.dp} tp{self.tp} ep{self.ep} expert-dp{self.expert_dp}"
        return text + (f" vpp{self.vpp}" if self.vpp > 1 else "") + (" recompute" if self.recompute else "")


@dataclass(frozen=True, kw_only=True)
class ClusterSpec:
    """A cluster by what plans and placement need to know of it. Bandwidths are per rank and direction.

    slow_links_gbytes_per_s: every exchange between ranks is slowed down to it, to stand in for a slow network
    (smartmoe.slow_links); 0 leaves links as they are.
    """

    name: str = "cpu"
    device: str = "cpu"
    num_nodes: int = 1
    ranks_per_node: int = 4
    intra_node_gbytes_per_s: float = 1.0
    inter_node_gbytes_per_s: float = 1.0
    tflops: float = 0.02
    memory_gbytes: float = 4.0
    slow_links_gbytes_per_s: float = 0.0

    @property
    def num_ranks(self) -> int:
        return self.num_nodes * self.ranks_per_node


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One complete training run."""

    system: str = "smartmoe"
    model: ModelConfig = field(default_factory=ModelConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    layer: LayerConfig = field(default_factory=LayerConfig)
    online: OnlineConfig = field(default_factory=OnlineConfig)
    workload: Workload = field(default_factory=Workload)
    plan: ParallelPlan = field(default_factory=ParallelPlan)
    cluster: ClusterSpec = field(default_factory=ClusterSpec)
    record_trace: bool = False
    record_spans: bool = False

    @property
    def num_micro_batches(self) -> int:
        return self.workload.global_batch_size // (self.workload.micro_batch_size * self.plan.dp)


def slowed(cluster: ClusterSpec, gbytes_per_s: float) -> ClusterSpec:
    """`cluster` with its links slowed down to a rate (0: as it is), and with the name and the bandwidths of that."""
    if not gbytes_per_s:
        return cluster
    rates = {
        key: min(getattr(cluster, key), gbytes_per_s) for key in ("intra_node_gbytes_per_s", "inter_node_gbytes_per_s")
    }
    name = f"{cluster.name}, links slowed to {gbytes_per_s:g} GB/s"
    return dataclasses.replace(cluster, name=name, slow_links_gbytes_per_s=gbytes_per_s, **rates)


# ---------------------------------------------------------------------------------------------------------- checks


def check(config: RunConfig, where: str = "config") -> RunConfig:
    """Return `config` unchanged, or raise ValueError listing every size that does not fit and how to mend it."""
    parts = (_model_problems, _choice_problems, _plan_problems, _replica_problems, _batch_problems)
    problems = swin_sizes.problems(config.model, config.plan)
    problems = problems or [problem for part in parts for problem in part(config)]  # which ask for the sizes of its blocks
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))
    return config


def check_layer(config: RunConfig, where: str = "config") -> RunConfig:
    """As `check`, of what a layer alone reads: sizes of its experts, gate, mechanism and room for copies, no plan or batch."""
    model, online = config.model, config.online
    problems = _below_one(model, ("num_layers", "hidden_size", "ffn_size", "num_experts", "top_k"))
    problems += _gate_problems(config) + _choice_problems(config)
    if (online.replicate == "never") != (online.replica_slots == 0):
        problems.append(
            f'online.replicate = "{online.replicate}" does not go with online.replica_slots = {online.replica_slots}: copies '
            'need both, a mode and at least one slot; "never" and 0 turn them off'
        )
    if problems:
        raise ValueError(f"{where}: " + "; ".join(problems))
    return config


def _below_one(model: ModelConfig, keys: tuple[str, ...]) -> list[str]:
    return [f"model.{key} = {getattr(model, key)} must be at least 1" for key in keys if getattr(model, key) < 1]


def _model_problems(config: RunConfig) -> list[str]:
    model, dtype_bytes = config.model, 4 if config.workload.dtype == "float32" else 2
    sizes = ("num_layers", "hidden_size", "ffn_size", "num_heads", "seq_len", "num_experts", "top_k", "moe_every")
    problems = _below_one(model, sizes)
    if problems:
        return problems
    if model.vocab_size < 257 and model.swin is None:
        problems.append(f"model.vocab_size = {model.vocab_size} must be at least 257 (256 bytes and end-of-text)")
    if model.hidden_size % model.num_heads:
        problems.append(
            f"model.hidden_size = {model.hidden_size} is not a multiple of model.num_heads = {model.num_heads}"
        )
    if config.layer.experts == "grouped":
        for key in ("hidden_size", "ffn_size"):
            if getattr(model, key) * dtype_bytes % 16:
                problems.append(
                    f"model.{key} = {getattr(model, key)} makes rows that are no multiple of 16 bytes, which grouped GEMM "
                    f'needs: take a multiple of {16 // dtype_bytes}, or layer.experts = "loop"'
                )
    return problems + _gate_problems(config)


def _gate_problems(config: RunConfig) -> list[str]:
    model, problems = config.model, []
    if model.top_k > model.num_experts:
        problems.append(f"model.top_k = {model.top_k} is more than model.num_experts = {model.num_experts}")
    if config.gate.kind == "switch" and model.top_k != 1:
        problems.append(
            f'gate.kind = "switch" routes each token to one expert: set model.top_k = 1 (it is {model.top_k})'
        )
    if config.gate.kind == "gshard" and model.top_k != 2:
        problems.append(
            f'gate.kind = "gshard" routes each token to two experts: set model.top_k = 2 (it is {model.top_k})'
        )
    return problems


def _choice_problems(config: RunConfig) -> list[str]:
    choices = (
        ("gate.kind", config.gate.kind, GATES),
        ("gate.scope", config.gate.scope, SCOPES),
        ("layer.dispatcher", config.layer.dispatcher, DISPATCHERS),
        ("layer.experts", config.layer.experts, EXPERT_IMPLS),
        ("online.policy", config.online.policy, ONLINE_POLICIES),
        ("online.replicate", config.online.replicate, REPLICATE_MODES),
        ("workload.dtype", config.workload.dtype, DTYPES),
        ("workload.cuda_graph", config.workload.cuda_graph, CUDA_GRAPH),
        ("model.activation", config.model.activation, ACTIVATIONS),
        ("cluster.device", config.cluster.device, ("cpu", "cuda")),
    )
    problems = [
        f'{key} = "{value}" is not one of {", ".join(known)}' for key, value, known in choices if value not in known
    ]
    if config.gate.capacity is not None and not config.gate.capacity > 0:
        problems.append(f"gate.capacity = {config.gate.capacity} must be positive, or null for no limit")
    if config.gate.kind == "trace" and not config.gate.trace:
        problems.append('gate.kind = "trace" needs gate.trace, the path of an .npz trace')
    if config.online.interval < 1:
        problems.append(f"online.interval = {config.online.interval} must be at least 1")
    if config.online.horizon < 1:
        problems.append(f"online.horizon = {config.online.horizon} must be at least 1")
    if not 0 <= (config.online.min_gain or 0.0) < 1:
        problems.append(f"online.min_gain = {config.online.min_gain} must be in 0 .. 1, or null for the policy's own")
    if config.layer.overlap_groups < 1:
        problems.append(f"layer.overlap_groups = {config.layer.overlap_groups} must be at least 1")
    if config.layer.overlap_degree not in OVERLAP_DEGREES:
        degrees = ", ".join(map(str, OVERLAP_DEGREES))
        problems.append(f"layer.overlap_degree = {config.layer.overlap_degree} is not one of {degrees}; 0 is tried out")
    if config.layer.overlap_degree and config.layer.dispatcher != "pipelined":
        problems.append('layer.overlap_degree is part of layer.dispatcher = "pipelined"')
    is_searched = config.layer.dispatcher == "pipelined" and not config.layer.overlap_degree
    if is_searched and config.plan.recompute and config.plan.pp > 1:
        problems.append(
            'layer.dispatcher = "pipelined" may have found another choice when a pass of a pipeline is computed again: set '
            "layer.overlap_degree, plan.recompute = false or plan.pp = 1"
        )
    if config.layer.experts == "batched" and config.layer.dispatcher not in EQUAL_BLOCKS:
        problems.append(
            'layer.experts = "batched" needs equally many rows for every expert: set layer.dispatcher to '
            f'{" or ".join(EQUAL_BLOCKS)}, or layer.experts = "grouped"'
        )
    if not config.layer.row_factor >= 1:
        problems.append(f"layer.row_factor = {config.layer.row_factor} must be at least 1, what is needed")
    if not config.cluster.slow_links_gbytes_per_s >= 0:
        problems.append("cluster.slow_links_gbytes_per_s must be positive, or 0 for links as they are")
    if config.cluster.slow_links_gbytes_per_s and config.layer.dispatcher == "direct":
        problems.append(
            'layer.dispatcher = "direct" stores into the memory of other GPUs, which cluster.slow_links_gbytes_per_s does '
            'not slow down: take "auto" or "basic"'
        )
    if config.layer.shadowing and config.layer.dispatcher != "overlapped":
        problems.append('layer.shadowing is part of layer.dispatcher = "overlapped"')
    return problems


def _plan_problems(config: RunConfig) -> list[str]:
    plan, model, cluster = config.plan, config.model, config.cluster
    problems = [
        f"plan.{key} = {getattr(plan, key)} must be at least 1"
        for key in ("pp", "vpp", "dp", "tp", "ep")
        if getattr(plan, key) < 1
    ]
    if problems:
        return problems
    if plan.world_size != cluster.num_ranks:
        problems.append(
            f"plan pp {plan.pp} x dp {plan.dp} x tp {plan.tp} = {plan.world_size} ranks, but cluster {cluster.name} has "
            f"{cluster.num_nodes} x {cluster.ranks_per_node} = {cluster.num_ranks}"
        )
    if plan.stage_size % plan.ep:
        problems.append(
            f"plan.ep = {plan.ep} does not divide the dp * tp = {plan.stage_size} ranks of a pipeline stage"
        )
    if model.num_experts % plan.ep:
        problems.append(f"plan.ep = {plan.ep} does not divide model.num_experts = {model.num_experts}")
    if model.num_heads % plan.tp:
        problems.append(f"plan.tp = {plan.tp} does not divide model.num_heads = {model.num_heads}")
    if model.seq_len % plan.tp:
        problems.append(
            f"plan.tp = {plan.tp} does not divide model.seq_len = {model.seq_len} (tokens are sharded over tp)"
        )
    if model.ffn_size % plan.tp and model.moe_every > 1:
        problems.append(f"plan.tp = {plan.tp} does not divide model.ffn_size = {model.ffn_size}")
    if plan.pp == 1 and plan.vpp > 1:
        problems.append(f"plan.vpp = {plan.vpp} interleaves pipeline stages: it needs plan.pp > 1")
    if model.num_layers < plan.pp * plan.vpp:
        problems.append(f"model.num_layers = {model.num_layers} is less than plan.pp * plan.vpp = {plan.pp * plan.vpp}")
    return problems


def _replica_problems(config: RunConfig) -> list[str]:
    online, plan, model = config.online, config.plan, config.model
    slots = online.replica_slots
    if slots < 0:
        return [f"online.replica_slots = {slots} must be at least 0"]
    if online.return_early and online.replicate != "history":
        return [f'online.return_early is for online.replicate = "history", not "{online.replicate}"']
    if online.replicate == "never":
        return [f'online.replica_slots = {slots} needs online.replicate = "history" or "exact"'] if slots else []
    if plan.ep < 2:
        return [f'online.replicate = "{online.replicate}" needs experts on several ranks: plan.ep = {plan.ep}']
    problems, most = [], model.num_experts - model.num_experts // plan.ep
    if online.replicate == "history" and online.policy in ("greedy", "least_move"):
        problems.append(
            f'online.replicate = "history" is decided by online.policy = "auto", not by "{online.policy}": take that, with '
            f'migrate = false where owners shall stay, or replicate = "exact"'
        )
    if not 1 <= slots <= most:
        problems.append(
            f"online.replica_slots = {slots} must be in 1 .. {most}, the experts that a rank does not own itself"
        )
    if config.layer.shadowing:
        problems.append("layer.shadowing and online.replicate both copy hot experts: take one of them")
    needed, limit = replica_bytes(config), config.cluster.memory_gbytes * 1e9
    if needed > limit:
        problems.append(
            f"online.replica_slots = {slots} takes {needed / 1e9:.1f} GB a rank, cluster.memory_gbytes = "
            f"{config.cluster.memory_gbytes}: take fewer"
        )
    return problems


def replica_bytes(config: RunConfig) -> int:
    """Most memory that replicas take on a rank, whatever the skew: the weights in the replica slots of its MoE layers, in
    "history" mode their float32 gradients, and what a collective exchange of either stages in both directions. Between GPUs
    that reach each other's memory it is less: neither those sums nor that staging, but gradients of one layer's slots."""
    model, plan, slots = config.model, config.plan, config.online.replica_slots
    layers = -(-model.num_layers // (max(model.moe_every, 1) * max(plan.pp, 1)))
    numel = expert_numel(model)
    if model.swin is not None:
        numels = [expert_numel(block_sizes(model, idx)) for idx in range(model.num_layers) if has_experts(model, idx)]
        layers, numel = len(numels), max(numels)
    element = 4 if config.workload.dtype == "float32" else 2
    if config.online.replicate == "history":
        return slots * numel * (layers * (element + 4) + 4 * (max(2 * layers, plan.ep) + layers))
    return slots * numel * element * (layers + plan.ep + 1)


def expert_numel(model: ModelConfig) -> int:
    """Weights of one expert."""
    wide = model.ffn_size * (2 if model.activation == "swiglu" else 1)
    return model.hidden_size * (wide + model.ffn_size) + (wide + model.hidden_size) * model.expert_bias


def _batch_problems(config: RunConfig) -> list[str]:
    work, plan = config.workload, config.plan
    problems = [
        f"workload.{key} = {getattr(work, key)} must be at least 1"
        for key in ("global_batch_size", "micro_batch_size", "iterations")
        if getattr(work, key) < 1
    ]
    if problems or plan.dp < 1:
        return problems
    step = work.micro_batch_size * plan.dp
    if work.global_batch_size % step:
        problems.append(
            f"workload.global_batch_size = {work.global_batch_size} is not a multiple of micro_batch_size * dp = {step}"
        )
    elif plan.vpp > 1 and config.num_micro_batches % plan.pp:
        problems.append(
            f"interleaving needs micro-batches ({config.num_micro_batches}) in multiples of plan.pp = {plan.pp}"
        )
    elif plan.pp > config.num_micro_batches:
        problems.append(
            f"a pipeline of plan.pp = {plan.pp} stages needs as many micro-batches, but there are "
            f"{config.num_micro_batches}: lower pp, dp or micro_batch_size, or raise global_batch_size"
        )
    if not 0 <= work.warmup_iterations < work.iterations:
        problems.append(
            f"workload.warmup_iterations = {work.warmup_iterations} must be below iterations = {work.iterations}"
        )
    if work.zero not in (0, 1, 2, 3):
        problems.append(
            f"workload.zero = {work.zero} must be 0, 1 (optimizer state sharded), 2 (gradients, too) or 3 (weights, too)"
        )
    if work.clip_grad < 0:
        problems.append(f"workload.clip_grad = {work.clip_grad} must be positive, or 0 for no clipping")
    keys = ("lr", "min_lr", "lr_warmup_iterations", "weight_decay", "checkpoint_interval")
    problems += [f"workload.{key} = {getattr(work, key)} must be at least 0" for key in keys if getattr(work, key) < 0]
    keys = ("adam_beta1", "adam_beta2")
    problems += [
        f"workload.{key} = {getattr(work, key)} must be in 0 .. 1, below 1" for key in keys if not 0 <= getattr(work, key) < 1
    ]
    keys = ("adam_eps", "initial_loss_scale")
    problems += [f"workload.{key} = {getattr(work, key)} must be positive" for key in keys if not getattr(work, key) > 0]
    return problems


# ------------------------------------------------------------------------------------------------- dict, TOML, JSON


def to_dict(config) -> dict:
    """A JSON-ready dict of any of the dataclasses above."""
    return dataclasses.asdict(config)


def from_dict(cls: type, data: dict, where: str = "config"):
    """Build dataclass `cls` from a plain dict.

    Raises ValueError naming `where`, the key and the nearest known key when a key is unknown or a value has the wrong type.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected a table of {cls.__name__} keys, got {type(data).__name__}")
    hints, known = typing.get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}
    values = {}
    for key, value in data.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else f"; known keys: {', '.join(known)}"
            raise ValueError(f'{where}: unknown key "{key}"{hint}')
        values[key] = _coerce(hints[key], value, f"{where}: {key}")
    return cls(**values)


def _coerce(hint, value, where: str):
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        if not isinstance(value, (list, tuple)) or not all(type(item) is kind for item in value):
            names = {str: "strings", int: "whole numbers"}
            raise ValueError(f"{where}: expected a list of {names[kind]}, got {value!r}")
        return tuple(value)
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in allowed:
        return None
    if isinstance(value, dict) and (tables := [kind for kind in allowed if dataclasses.is_dataclass(kind)]):
        return from_dict(tables[0], value, where)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) and bool not in allowed or not isinstance(value, allowed):
        names = " or ".join(getattr(t, "__name__", str(t)) for t in allowed)
        raise ValueError(f"{where}: expected {names}, got {value!r}")
    if isinstance(value, float) and not math.isfinite(value):
        no_limit = "; leave the key out for no limit" if type(None) in allowed else ""
        raise ValueError(f"{where}: {value} is no finite number{no_limit}")
    return value


def load(path: str | Path, cls: type = RunConfig):
    """Read a TOML or JSON file into dataclass `cls`. Raises ValueError naming the file when it cannot be read or parsed."""
    path = Path(path)
    return from_dict(cls, read_table(path), str(path))


def read_table(path: str | Path) -> dict:
    """Parse a .toml or .json file. Raises ValueError with the file and the parser's line when it is not well formed."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: cannot read this file: {error}") from None
