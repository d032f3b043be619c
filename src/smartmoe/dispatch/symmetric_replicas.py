"""Replication between GPUs that reach each other's memory: sent and returned on the device, and decided there.

Each micro-batch decides from its own counts which experts get replicas, on every rank alike; the host never waits and
never learns what was decided. Where the host decides for whole steps (replicas.SymmetricHistory) weights and gradients travel
in the same way: the former behind the dispatch, beside the first product, the latter beside the last one. Needs what
`smartmoe.dispatch.symmetric` needs. W ranks, E experts, L owned and G replica slots of a rank, N = W * G replica slots of
all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import Variable

from smartmoe.dispatch.symmetric import _allocate, _power_of_two
from smartmoe.ops.all_to_all import group_rank, group_size
from smartmoe.ops.late_slots import LateSlots
from smartmoe.placement import BUCKETS, Placement
from smartmoe.solvers.exact_step import NEAR

# Token copies that an expert must take along to be worth sending. Alone, sending one expert and returning its gradient took
# two H200s 0.17 ms for shape S1 of bench.shapes and 0.44 ms for S2: the time in which a rank computes 1500 and 1700 copies
# (bytes and operations both grow with an expert's weights, so the size hardly matters). In a layer a part of it is hidden.
COPY_COST = 1024
_ALIGNMENT = 256
_COPY_ALIGNMENT = 16
# Planning: blocks, counts that each of them reads, copies that it holds at a time.
_MOST_PLANNERS, _COUNTS_READ, _PLAN_BLOCKS, _PLAN_WARPS = 32, 8192, (256, 4096), 4
# Weights and gradients travel beside products: few blocks with much under way take fewest multiprocessors.
_NUM_PULL_BLOCKS, _PULL_WORDS, _PULL_WARPS = 12, 32768, 16
_NUM_RETURN_BLOCKS, _RETURN_BYTES, _RETURN_WARPS = 32, 32768, 8
_BOARDS: dict[tuple, _Board] = {}


@dataclass(frozen=True)
class StepPlan:
    """What one micro-batch decided, on the device. slot_TK: [T, K] int64 physical slot of each copy, -1 = dropped;
    replica_N: [N] int32 expert in each replica slot of all ranks, -1 = empty; held_G: [G] those of this rank."""

    slot_TK: torch.Tensor
    replica_N: torch.Tensor
    held_G: torch.Tensor


class SymmetricReplication:
    """Replication of one layer's experts by the counts of each micro-batch; a layer's view of it is
    smartmoe.replicas.Replication. copy_cost: see solvers.solve_exact_step; None = another than this class decides.

    Building a layer (`allocate`, the first `set_placement`) is collective over the group. So are `plan` and `return_grads`,
    by flags in the peers' memory, without host synchronisation; they can be captured in a CUDA graph. All ranks make the
    same calls in the same order. Which micro-batch filled the slots last is known on the host: where a graph holds a backward
    pass, and other forward passes may be replayed before it, `forget_weights` must be called before that is captured.
    Between the filling of replica slots and the next change of any owner's weights there must be an exchange of the whole
    group on the stream of the layer, as the combine of the direct dispatcher is: it tells owners that all have read.
    """

    is_early = follows_tokens = True

    def __init__(self, ep_group, num_replicas: int, copy_cost: int | None = COPY_COST):
        self.group, self.num_replicas, self.copy_cost = ep_group, num_replicas, copy_cost
        self.num_ranks, self.ep_rank = group_size(ep_group), group_rank(ep_group)
        self._addresses: dict[int, list[int]] = {}
        self._board: _Board | None = None
        self._held: StepPlan | None = None

    def allocate(self, shape: tuple[int, ...], *, dtype: torch.dtype, device) -> torch.Tensor:
        """Zeroed memory [L + G, ...] that all ranks of the group reach. Collective.

        Raises ValueError when a slot is not a multiple of 16 bytes, and, with several ranks, when the device is no GPU.
        """
        device = torch.get_default_device() if device is None else torch.device(device)
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        if num_bytes // shape[0] % _COPY_ALIGNMENT:
            raise ValueError(
                f"exact replication: {num_bytes // shape[0]} bytes of a weight {list(shape[1:])} are no multiple of "
                f"{_COPY_ALIGNMENT}: change hidden_size or ffn_size"
            )
        buffer, addresses = _allocate(num_bytes, device, self.group)
        storage = buffer[:num_bytes].view(dtype).view(shape)
        self._addresses[storage.data_ptr()] = addresses
        return storage

    def bind(self, storages: Sequence[torch.Tensor]) -> None:
        """Take the layer's storages, all from `allocate`: w1, (b1,) w2, (b2)."""
        from smartmoe.dispatch import replica_kernels

        self._kernels = replica_kernels
        self.storages, device = tuple(storages), storages[0].device
        self.num_owned = storages[0].shape[0] - self.num_replicas
        addresses = [self._addresses[storage.data_ptr()] for storage in storages]
        self._addresses_SW = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._sizes = tuple(storage[0].numel() for storage in storages)
        self._sizes_S = torch.tensor(self._sizes, device=device)
        self._words_S = self._sizes_S * storages[0].element_size() // 4

    def set_placement(self, placement: Placement) -> None:
        """Replicate experts of `placement` from now on. Collective on the first call."""
        self.placement = placement
        device = self.storages[0].device
        if self._board is None:
            sizes = (placement.num_experts, self.num_owned, self.num_replicas, *self._sizes)
            key = (self.group, self.storages[0].dtype, device, *sizes)
            if key not in _BOARDS:
                _BOARDS[key] = _Board(
                    self.group, placement.num_experts, self.num_replicas, self._sizes, self.storages[0]
                )
            self._board = _BOARDS[key]
            self._primary_E = torch.empty(placement.num_experts, dtype=torch.int32, device=device)
        self._primary_E.copy_(torch.from_numpy(placement.primary_slot_E))

    def plan(self, expert_idx_TK: torch.Tensor, token_id_T: torch.Tensor) -> StepPlan:
        """Count the copies of all ranks, decide (solvers.solve_exact_step) and find each copy's slot.

        expert_idx_TK: [T, K] int64, -1 = dropped; token_id_T: [T] int64. Collective, no host synchronisation.
        """
        board, expert_idx_TK = self._board, expert_idx_TK.contiguous()
        slot_TK = torch.empty_like(expert_idx_TK)
        replica_N = torch.empty(self.num_ranks * self.num_replicas, dtype=torch.int32, device=slot_TK.device)
        num_copies, top_k = expert_idx_TK.numel(), expert_idx_TK.shape[1]
        self._kernels.plan_kernel[(board.num_planners,)](
            expert_idx_TK, token_id_T, slot_TK, self._primary_E, replica_N, board.peers_W, board.planned,
            board.offset["counts"], self.ep_rank, num_copies, top_k, self.num_owned, self.num_replicas, board.num_experts,
            self.copy_cost * BUCKETS, BUCKETS=BUCKETS, NEAR=NEAR, W=self.num_ranks, W_PAD=_power_of_two(self.num_ranks),
            E_PAD=board.experts_pad, N_PAD=_power_of_two(replica_N.shape[0]), P=board.num_planners,
            BLOCK=_plan_block(num_copies, board.num_planners), num_warps=_PLAN_WARPS,
        )  # fmt: skip
        return StepPlan(slot_TK, replica_N, replica_N.view(self.num_ranks, self.num_replicas)[self.ep_rank])

    def send_weights(self, plan: StepPlan) -> None:
        """Start to fill this rank's replica slots from the owners' memory."""
        self._held, board = plan, self._board
        with board.beside():
            self._kernels.pull_kernel[(_NUM_PULL_BLOCKS,)](
                plan.replica_N, self._primary_E, self._addresses_SW, self._words_S, 0, len(self.storages), self.ep_rank,
                self.num_owned, self.num_replicas, self.num_ranks, BLOCK=_PULL_WORDS, num_warps=_PULL_WARPS,
            )  # fmt: skip

    def restore_weights(self, plan: StepPlan) -> None:
        """Start to fill the replica slots as `plan` had them, unless they are so still."""
        if self._held is not plan:
            self.send_weights(plan)

    def forget_weights(self) -> None:
        """Take the slots for filled by nobody knows whom."""
        self._held = None

    def wait_weights(self) -> None:
        """What is launched from now on reads filled slots."""
        self._board.join()

    def late_slots(self) -> LateSlots:
        """For those who need not wait for all weights."""
        return LateSlots(self.num_owned, self._board.beside, self._board.join)

    def return_grads(self, plan: StepPlan, grads: Mapping[int, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Start to add the gradients of replicas, [G, ...], to those of their owners, [L, ...], in place: number of a storage
        -> (owners', replicas'), contiguous. Collective; finished after `wait_grads`."""
        items = sorted(grads.items(), key=lambda item: (-self._sizes[item[0]], item[0]))  # two large ones together
        with self._board.beside():
            for first in range(0, len(items), 2):
                self._return(plan, items[first : first + 2])

    def wait_grads(self) -> None:
        """What is launched from now on reads whole gradients."""
        self._board.join()

    def leave_grads(self, read: object) -> None:
        """What is launched behind the backward pass that runs reads whole gradients, as does what follows the next wait."""
        self._board.keep(read)
        Variable._execution_engine.queue_callback(self._board.join)

    def _return(self, plan, items):
        board, (first, (owned_a, copies_a)), (last, (owned_b, copies_b)) = self._board, items[0], items[-1]
        self._kernels.return_kernel[(_NUM_RETURN_BLOCKS,)](
            owned_a, copies_a, owned_b, copies_b, plan.replica_N, self._primary_E, self._sizes_S, board.peers_W,
            board.added, first, last, board.offset[f"stage{first}"], board.offset[f"stage{last}"],
            board.offset["staged"], board.offset["added"], self.ep_rank, self.num_owned, self.num_replicas,
            plan.replica_N.shape[0], W=self.num_ranks, HAS_B=len(items) > 1, N_PAD=_power_of_two(plan.replica_N.shape[0]),
            BLOCK=_RETURN_BYTES // copies_a.element_size(), num_warps=_RETURN_WARPS,
        )  # fmt: skip


class _Board:
    """What all layers of the same sizes share: counts, flags and staged gradients in memory that all ranks reach, and a
    stream on which weights and gradients travel."""

    def __init__(self, group, num_experts: int, num_replicas: int, sizes: Sequence[int], like: torch.Tensor):
        num_ranks, device = group_size(group), like.device
        self.num_experts, self.experts_pad = num_experts, max(_power_of_two(num_experts), 32)
        # a power of two, so that the number of blocks that have ended may run over
        self.num_planners = max(1, min(_MOST_PLANNERS, _COUNTS_READ // (_power_of_two(num_ranks) * self.experts_pad)))
        regions = {"counts": 2 * num_ranks * self.num_planners * self.experts_pad * 8}
        regions |= {"staged": 2 * num_ranks * _NUM_RETURN_BLOCKS * 4, "added": num_ranks * 4}
        regions |= {f"stage{i}": num_replicas * size * like.element_size() for i, size in enumerate(sizes)}
        self.offset, total = {}, 0
        for name, num_bytes in regions.items():
            self.offset[name] = total
            total += -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        self._buffer, addresses = _allocate(total, device, group)
        self.peers_W = torch.tensor(addresses, dtype=torch.int64, device=device)
        # blocks that have planned; a pair for direct_kernels._signal
        self.planned, self.added = torch.zeros(3, dtype=torch.int32, device=device).split([1, 2])
        self._beside, self._is_apart = torch.cuda.Stream(device, priority=-1), False
        self._read: list[object] = []  # what holds memory that is read beside the current stream

    def beside(self):
        """A context whose work runs beside the current stream, after what is queued there."""
        self._beside.wait_stream(torch.cuda.current_stream(self._beside.device))
        self._is_apart = True
        return torch.cuda.stream(self._beside)

    def keep(self, read: object) -> None:
        """Memory that work beside the current stream reads, so that it is given back behind `join`."""
        self._read.append(read)

    def join(self) -> None:
        """The current stream goes on after what is queued beside it, if anything is."""
        if self._is_apart:
            torch.cuda.current_stream(self._beside.device).wait_stream(self._beside)
        self._is_apart = False
        self._read.clear()


def _plan_block(num_copies: int, num_planners: int) -> int:
    least, most = _PLAN_BLOCKS
    return min(max(_power_of_two(-(-num_copies // num_planners)), least), most)
