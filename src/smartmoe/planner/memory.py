"""Device memory of a plan: what the trainer, its autograd graph and the pipeline schedule keep alive.

Counts what the code allocates through torch on a GPU. The state: weights in the training dtype (routers in float32),
float32 masters beside 16-bit weights, two float32 moments, one flat float32 gradient; ZeRO-1 shares masters and moments
out, ZeRO-2 gradients and ZeRO-3 weights, too (planner.sharding). Activations: the tensors that
autograd saves in smartmoe.gpt, gates, ops and dispatch, for as many micro-batches as the schedule holds. The pipeline
library keeps receive buffers for every micro-batch of a step. Where a pipeline's passes are captured in CUDA graphs, every
micro-batch that can be in flight in a chunk has memory of its own for all that its passes need. Bytes everywhere.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from smartmoe.config import ModelConfig, ParallelPlan, expert_numel
from smartmoe.planner.layer_cost import LayerSetting
from smartmoe.planner.parameters import Parameters, block_parameters, chunk_layers, has_experts, hidden_width
from smartmoe.planner.schedule import most_in_flight, num_in_flight
from smartmoe.planner.sharding import kept_bytes, pass_bytes

OUTSIDE_BYTES = 1.5e9  # device context, code and NCCL: what torch's allocator does not see
MARGIN = 0.94  # of the device that a chosen plan may take: fragmentation costs the rest
ERROR = 0.08  # how much too high a prediction may be (24 plans of two H200: 3.5 % too low to 1.9 % too high)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of the fullest stage. total: what torch's allocator peaks at, plus `outside`."""

    weights: float
    masters: float
    moments: float
    gradients: float
    activations: float
    buffers: float
    transient: float
    outside: float
    pp_stage: int

    @property
    def allocated(self) -> float:
        """Peak of torch's allocator."""
        parts = (self.weights, self.masters, self.moments, self.gradients, self.activations, self.buffers, self.transient)
        return sum(parts)

    @property
    def total(self) -> float:
        return self.allocated + self.outside


def _units(model: ModelConfig, plan: ParallelPlan, is_end: bool) -> list[Parameters]:
    """What a rank gathers or reduces at once: a block, and at an end of the pipeline embeddings or the head."""
    units = [block_parameters(model, plan, kind) for kind in {has_experts(model, layer) for layer in range(model.num_layers)}]
    if is_end:
        table = model.vocab_size * model.hidden_size
        units.append(Parameters(dense=table, largest=table, tensors=1))
    return units


@dataclass(frozen=True)
class Held:
    """What the stages of a plan hold or stage whatever the micro-batch and the loads are, each [stages]: state; the largest
    gradient that a product hands over; what ZeRO stages when the activations are gone; what passes exchange; replica slots
    of all layers, and of one."""

    weights: np.ndarray
    masters: np.ndarray
    moments: np.ndarray
    gradients: np.ndarray
    handed_over: np.ndarray
    staged: np.ndarray
    in_passes: np.ndarray
    copied: np.ndarray
    copied_in_layer: np.ndarray


def held(plan: ParallelPlan, setting: LayerSetting, parameters: list[Parameters], zero: int = 0) -> Held:
    """What stages hold. parameters: of each chunk. zero: as workload.zero. Of `setting` nothing that loads or tokens change."""
    model, bytes_ = setting.model, setting.dtype_bytes
    replicate = "never" if not setting.replica_slots else "exact" if setting.is_exact else "history"
    in_passes = {
        is_end: max(pass_bytes(unit, plan, bytes_, zero, replicate) for unit in _units(model, plan, is_end))
        for is_end in (False, True)
    }
    stages = []
    for pp_stage in range(plan.pp):
        mine = sum(parameters[pp_stage :: plan.pp], Parameters())
        # products of experts add gradients to their sums themselves, as on GPUs attention's and the head's do; embeddings, of
        # the head's size, hand them over
        largest = mine.largest if setting.layer.experts == "grouped" else max(mine.largest, mine.largest_expert)
        # replica slots: weights, and where they stay for a step float32 sums of their gradients (config.replica_bytes): too
        # much where kernels carry these (replicas.SymmetricHistory), which stage those of one layer in the training dtype
        copied = setting.replica_slots * mine.expert / (model.num_experts // plan.ep)
        weights, gradients = kept_bytes(mine, plan, bytes_, zero, replicate)
        stages.append((
            weights, *optimizer_bytes(mine, plan, bytes_, zero), gradients, bytes_ * largest,
            4 * max(mine.largest, mine.largest_expert) if zero and plan.stage_size > 1 else 0.0,
            in_passes[pp_stage in (0, plan.pp - 1)], copied, setting.replica_slots * expert_numel(model) if copied else 0.0,
        ))  # fmt: skip
    return Held(*np.array(stages, float).T)


@dataclass(frozen=True)
class Rows:
    """The most rows that a rank computes, or has room for, in a sample: in one layer, and in all layers of each chunk [C]."""

    fullest: float
    of_chunks: np.ndarray


def most_rows(setting: LayerSetting, rows_SLW: np.ndarray, num_chunks: int) -> Rows:
    """rows_SLW: rows that each rank of an expert group computes in a micro-batch, by sample and MoE layer; the worst sample
    counts."""
    if setting.layer.dispatcher == "direct" and rows_SLW.size:  # every rank has room for more than the fullest needs
        room_SL1 = setting.layer.row_factor * rows_SLW.max(-1, keepdims=True)
        rows_SLW = np.minimum(room_SL1, setting.ep * setting.copies)
    num_moe, _ = _blocks_of_chunks(setting.model, num_chunks)
    rows_before = np.concatenate([np.zeros((len(rows_SLW), 1, rows_SLW.shape[2])), rows_SLW.cumsum(1)], 1)
    last_C = num_moe.cumsum()
    of_chunks = (rows_before[:, last_C] - rows_before[:, last_C - num_moe]).max((0, 2))
    return Rows(float(rows_SLW.max()) if rows_SLW.size else 0.0, of_chunks)


@functools.lru_cache(maxsize=1024)
def _blocks_of_chunks(model: ModelConfig, num_chunks: int) -> tuple[np.ndarray, np.ndarray]:
    """[C] blocks with experts of each chunk, and without."""
    layers = chunk_layers(model.num_layers, num_chunks)
    num_moe = np.array([sum(has_experts(model, layer) for layer in part) for part in layers])
    return num_moe, np.array([len(part) for part in layers]) - num_moe


@functools.lru_cache(maxsize=4096)
def _flights(pp: int, vpp: int, num_micro_batches: int, has_rooms: bool) -> np.ndarray:
    """[C] micro-batches in flight in each chunk when its stage has most of them, or room for."""
    of_stage = most_in_flight if has_rooms else num_in_flight
    return np.array([of_stage(pp_stage, pp, vpp, num_micro_batches) for pp_stage in range(pp)]).T.ravel()


def estimate(
    plan: ParallelPlan,
    setting: LayerSetting,
    micro_batch: int,
    num_micro_batches: int,
    rows: Rows,
    held: Held,
    is_captured: bool = False,
) -> Memory:
    """Memory of the fullest stage. is_captured: whether passes are CUDA graphs. Arrays here are [chunks], then [stages]."""
    model, bytes_, num_chunks = setting.model, setting.dtype_bytes, plan.pp * plan.vpp
    token_bytes = bytes_ * setting.tokens * model.hidden_size  # one activation [B, T, D]
    num_moe, num_dense = _blocks_of_chunks(model, num_chunks)
    fixed, per_row = _saved_by_block(setting, plan, micro_batch)
    dense_fixed = _saved_by_dense_block(setting, plan, micro_batch)
    loss_saved, loss_moment = _head(setting)
    has_rooms = is_captured and plan.pp > 1
    flights = _flights(plan.pp, plan.vpp, num_micro_batches, has_rooms)
    # in backward the activation once more and the rows' gradient; grouped products put the others where activations were.
    # One width more where other experts keep theirs, and for the gaps that each pass's own memory has in a captured pipeline
    is_grouped = setting.layer.experts == "grouped"
    rows_wide = hidden_width(model) * (1 if is_grouped else 3) + model.hidden_size * (2 if has_rooms or not is_grouped else 1)
    transient = bytes_ * rows.fullest * rows_wide + held.handed_over
    if plan.recompute:
        transient += max(fixed + rows.fullest * per_row, dense_fixed if model.moe_every > 1 else 0)
        saved = (num_moe + num_dense) * float(token_bytes)
    else:
        saved = num_moe * fixed + num_dense * dense_fixed + rows.of_chunks * per_row
    transient_at_head = max(transient[-1] - loss_saved, loss_moment)  # the logits are gone when the blocks' turn comes
    saved[-1] += loss_saved
    neighbours, buffers = np.full(num_chunks, 2), np.zeros(num_chunks)
    neighbours[0] -= 1
    neighbours[-1] -= 1
    if plan.pp > 1:
        saved[:-1] += token_bytes  # the output stays until its backward
        saved[1:] -= token_bytes  # the input is a receive buffer
        buffers += num_micro_batches * float(token_bytes) * neighbours
    if has_rooms:  # and places for what comes in, of the first micro-batch too
        saved[:-1] += np.tile(transient, plan.vpp)[:-1]
        saved[-1] += transient_at_head
        buffers += np.minimum(flights + 1, num_micro_batches) * float(token_bytes) * neighbours
    activations, buffers = ((x.reshape(plan.vpp, plan.pp)).sum(0) for x in (flights * saved, buffers))
    buffers += held.copied * (bytes_ if setting.is_exact else bytes_ + 4)
    if has_rooms:
        transient[:] = 0.0
    else:
        transient[-1] = transient_at_head
    if setting.is_exact:  # a collective exchange stages both directions, layer by layer
        transient += bytes_ * held.copied_in_layer * (plan.ep + 1)
    else:  # or all layers', when the activations are gone
        staged = 4 * (np.maximum(2 * held.copied, plan.ep * held.copied_in_layer) + held.copied)
        transient = np.maximum(transient, staged - activations)
    # ZeRO stages the largest parameter's gradient, or its weights, when the activations are gone
    transient = np.maximum(transient, held.staged - activations) + held.in_passes
    parts = dict(
        weights=held.weights, masters=held.masters, moments=held.moments, gradients=held.gradients, activations=activations,
        buffers=buffers, transient=transient,
    )  # fmt: skip
    outside = OUTSIDE_BYTES + _symmetric(setting)
    pp_stage = int((sum(parts.values()) + outside).argmax())
    return Memory(**{name: float(part[pp_stage]) for name, part in parts.items()}, outside=outside, pp_stage=pp_stage)


def optimizer_bytes(mine: Parameters, plan: ParallelPlan, dtype_bytes: int, zero: int) -> tuple[float, float]:
    """(float32 masters, moments) of one rank: of all that it has, with ZeRO-1 of its part. A float32 parameter is its own
    master unless it is shared out."""
    masters = moments = 0.0
    for numel, wide, sharers in (
        (mine.dense, mine.router, plan.stage_size),
        (mine.tensor, 0.0, plan.dp),
        (mine.expert, 0.0, plan.expert_dp),
    ):
        num = sharers if zero else 1
        moments += 8 * numel / num
        masters += 4 * (numel if num > 1 else (numel - wide) * (dtype_bytes < 4)) / num
    return masters, moments


def _attention(setting: LayerSetting, plan: ParallelPlan, micro_batch: int) -> float:
    """Bytes that the attention half of a block saves."""
    model, tokens = setting.model, setting.tokens
    gathered = tokens * plan.tp
    rows = tokens + gathered + 4 * gathered / plan.tp  # the norm's input; qkv's input; q, k, v and the output
    sums = 4 * micro_batch * model.num_heads / plan.tp * model.seq_len
    return setting.dtype_bytes * model.hidden_size * rows + sums + 8 * tokens


def _saved_by_dense_block(setting: LayerSetting, plan: ParallelPlan, micro_batch: int) -> float:
    model, tokens = setting.model, setting.tokens
    gathered = tokens * plan.tp
    mlp = tokens * model.hidden_size + gathered * model.hidden_size + 2 * gathered * model.ffn_size / plan.tp
    return _attention(setting, plan, micro_batch) + setting.dtype_bytes * mlp + 8 * tokens


def _saved_by_block(setting: LayerSetting, plan: ParallelPlan, micro_batch: int) -> tuple[float, float]:
    """(bytes that a block with experts saves whatever the routing, bytes for each row that its experts compute)."""
    model, tokens, bytes_ = setting.model, setting.tokens, setting.dtype_bytes
    width, copies, hidden = model.hidden_size, setting.copies, hidden_width(model)
    router = setting.router_bytes * tokens * width + 8 * tokens  # its input, or where need be a float32 copy
    if setting.gate.kind not in ("naive", "zero", "trace"):
        router += 4 * tokens * model.num_experts
    fixed = _attention(setting, plan, micro_batch) + bytes_ * tokens * width + router + 48 * copies
    if setting.layer.dispatcher == "direct":
        return fixed, bytes_ * (2 * width + hidden) + 16
    fixed += bytes_ * copies * width  # the rows that came back, for the weights' gradient
    inside = hidden if setting.layer.experts == "grouped" else hidden + model.ffn_size
    return fixed, bytes_ * (width + inside) + 24


def _head(setting: LayerSetting) -> tuple[float, float]:
    """(bytes that head and loss save, bytes that they need for a moment beside that)."""
    model, tokens = setting.model, setting.tokens
    hidden = setting.dtype_bytes * tokens * model.hidden_size
    # the logits, which their gradients overwrite, and one number a token
    return setting.dtype_bytes * tokens * model.vocab_size + 2 * hidden + 12 * tokens, hidden


def _symmetric(setting: LayerSetting) -> float:
    """Buffers of the direct dispatcher, shared by all layers of a rank."""
    if setting.layer.dispatcher != "direct" or setting.ep == 1:
        return 0.0
    rows = 2 * (setting.ep - 1) * setting.tokens * setting.model.hidden_size * setting.dtype_bytes
    return rows + 12.0 * setting.ep * setting.copies
