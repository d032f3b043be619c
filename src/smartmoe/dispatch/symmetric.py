"""The transport of the direct dispatcher on GPUs: kernels that store into the memory of the other ranks.

Needs Triton, and torch symmetric memory between GPUs of one host that reach each other's memory; one rank alone needs
no symmetric memory. NVLink multicast is not used. Shape letters are those of `smartmoe.dispatch.transport`.
"""

from __future__ import annotations

import importlib.util
import logging
import socket

import torch
import torch.distributed as dist

from smartmoe.dispatch.transport import LocalPlan, Told
from smartmoe.ops.all_to_all import group_rank, group_size

_ALIGNMENT = 256
_TILE_ELEMENTS = 2048  # of a tile that a block moves at once: larger ones take so many registers that few blocks run
_NUM_WARPS = 4
_BLOCKS_PER_PROCESSOR = 16  # as many as can run at once
# by which pushes are ahead of reads, to keep the link busy and what came in the cache: of tokens with a row for each copy; of
# tokens at least
_LAG_BYTES, _LEAST_LAG_BYTES = 12 << 20, 2 << 20
# of a rank's tokens, and copies of each: then tokens leave before their plan is there. With more copies, reads, which write a
# row for each, are what takes the time
_EARLY_BYTES, _EARLY_TOP_K = 64 << 20, 1
# by which pushes are ahead then: at first, while the plan is made; at the end; of sums at first
_AHEAD_BYTES, _BEHIND_BYTES, _SUMS_AHEAD_BYTES = 24 << 20, 2 << 20, 6 << 20
_WEIGH_ELEMENTS, _LEAST_COLUMNS = 2048, 64  # of a tile of `weigh`: twice the elements are slower where top_k is 8
_WEIGH_REGISTERS = 64  # left alone the compiler takes 64 to 96, by chance, and fewer blocks run at once
_ANNOUNCED = 512  # copies whose slots a block announces
_REASONS: dict[tuple, str | None] = {}
_log = logging.getLogger(__name__)


def why_unavailable(group, over_nvlink: bool = False) -> str | None:
    """Why the ranks of `group` cannot store into each other's memory, or None when they can.

    over_nvlink: a reason, too, where they reach each other by another way than NVLink (PCIe), which works but is slow;
    where torch cannot tell the ways apart, that is logged and the reach is taken for NVLink. The same answer on every
    rank. Collective on the first call for a group of GPUs: two small gathers of objects.
    """
    key = group, over_nvlink
    if key not in _REASONS:
        _REASONS[key] = _find_reason(group, over_nvlink)
    return _REASONS[key]


def _find_reason(group, over_nvlink) -> str | None:
    if not torch.cuda.is_available():
        return "no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if group_size(group) == 1:
        return None
    backend = str(dist.get_backend(group))
    # symmetric memory meets through the group's store and works with any backend; a plain gloo group is one for CPU tensors
    if "nccl" not in backend and "cuda:" not in backend:
        return f"the group's backend is {backend}, none for CUDA tensors (nccl)"
    device = torch.cuda.current_device()
    ranks = _gather_objects((socket.gethostname(), _identity(device)), group)
    mine = _reason_here(ranks, device, over_nvlink)
    return next((reason for reason in _gather_objects(mine, group) if reason), None)


def _reason_here(ranks: list[tuple[str, str]], device: int, over_nvlink: bool) -> str | None:
    """What this rank sees: `ranks` are (host, identity of the GPU) by rank."""
    if len({host for host, _ in ranks}) > 1:
        return "its ranks are on several hosts"
    visible = {_identity(idx): idx for idx in range(torch.cuda.device_count())}
    # a GPU that is hidden from this process cannot be asked about
    others = [visible[gpu] for _, gpu in ranks if visible.get(gpu, device) != device]
    if not all(torch.cuda.can_device_access_peer(device, peer) for peer in others):
        return f"GPU {device} cannot reach the memory of all others"
    if over_nvlink:
        if len({gpu for _, gpu in ranks}) < len(ranks):
            return "several of its ranks share a GPU"
        links = _nvlinks(device)
        if links is None or any(gpu not in visible for _, gpu in ranks):
            _log.info("GPU %d: torch cannot tell NVLink from another way to its peers, taking it for NVLink", device)
        elif not all(links[peer] for peer in others):
            return f"GPU {device} reaches some of the others, but not over NVLink"
    return None


def _identity(device: int) -> str:
    """The same for every process that sees this GPU, by whatever number."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _nvlinks(device: int) -> list[int] | None:
    """NVLinks from a GPU to each visible one, straight or through switches; None where this torch cannot tell."""
    try:
        from torch._C._autograd import DeviceType
        from torch._C._distributed_c10d import _detect_dma_connectivity

        return _detect_dma_connectivity(DeviceType.CUDA, "nvlink").matrix[device]
    except (ImportError, RuntimeError):
        return None


def _gather_objects(value, group) -> list:
    values = [None] * group_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


class SymmetricTransport:
    """As CollectiveTransport, without the host, and collective over the group by flags in the peers' memory.

    One buffer for each rank, the same layout everywhere: tokens and sums [N - C, D] of the other ranks, slots and
    weights [N, K], gradients of weights [C, K], rows needed [W], and flags. Each call that moves something ends when
    all that this rank uses of it has arrived, and something of every peer. A peer starts to fill a region again only
    after it saw our next call, which this stream launches after its reads of the region, as long as calls alternate
    between tokens (`bring`, `weigh`) and sums (`sum_back`). Where they do not, an extra meeting of all ranks stands
    between them. All calls must be made in the same order on all ranks and on one stream at a time. Building it is
    collective and must not be captured in a CUDA graph.

    plans_early: a plan's kernels begin while those before them run, which saves their launches.
    begins_early: there are so many tokens that `bring` begins, too, while the plan that was just announced for it is made.
    Its tokens must be there before the announcement then. Only the kernels of that plan run beside it.

    max_blocks: thread blocks of a call that moves rows, by default enough to fill the GPU: fewer leave room for what
    runs beside it.
    """

    def __init__(self, group, slots_per_rank: int, capacity: int, x_TD: torch.Tensor, top_k: int):
        if x_TD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"direct dispatcher: dtype {x_TD.dtype} is not float32, bfloat16 or float16")
        reason = why_unavailable(group)
        if reason is not None:
            raise ValueError(f'direct dispatcher: {reason}; take layer.dispatcher = "auto" or "basic"')
        from smartmoe.dispatch import direct_kernels

        self._kernels = direct_kernels
        self.group, self.slots_per_rank, self.capacity, self.top_k = group, slots_per_rank, capacity, top_k
        self.num_ranks, self.ep_rank = group_size(group), group_rank(group)
        self.width, self.dtype, self.device = x_TD.shape[1], x_TD.dtype, x_TD.device
        self.block_d = _column_block(self.width, 2048 if self.num_ranks <= 2 else 512)
        self.block_tokens = max(2, _TILE_ELEMENTS // self.block_d)
        self._num_turns = -(-capacity // self.block_tokens)
        self._lag = self._turns_of(max(_LAG_BYTES // (1 + top_k), _LEAST_LAG_BYTES)) if self.num_ranks > 1 else 0
        self.plans_early = _can_begin_early(self.device)
        self.begins_early = (
            self.plans_early
            and self.num_ranks > 1
            and capacity * self.width * self.dtype.itemsize >= _EARLY_BYTES
            and top_k <= _EARLY_TOP_K
        )
        self.max_blocks = _BLOCKS_PER_PROCESSOR * _num_processors(self.device)
        self._layout()
        # triples for _finish: calls that move rows, announcements; a pair for meetings
        states = torch.zeros(9, dtype=torch.int32, device=self.device).split([3, 3, 2, 1])
        self._calls, self._told, self._met, self.odd = states
        self.is_open = False  # tokens were sent last, not sums
        self._stream = self._wanted_L = None

    def new_told(self) -> Told:
        """As CollectiveTransport.new_told."""
        zero = torch.zeros(1, dtype=torch.int32, device=self.device)
        return Told(torch.zeros(2, dtype=torch.int32, pin_memory=True), zero)

    def _layout(self):
        num_copies = self.num_ranks * self.capacity * self.top_k
        # a rank reads its own input and writes its own output in place: rows of the others only
        rows = (self.num_ranks - 1) * self.capacity * self.width
        regions = {
            "tokens": (rows, self.dtype),
            "sums": (rows, self.dtype),
            "copies": (num_copies, torch.int64),
            "grads": (self.capacity * self.top_k, torch.float32),
            "needed": (self.num_ranks, torch.int32),
            "flags": (self.num_ranks * self._num_turns, torch.int32),
            "met": (self.num_ranks, torch.int32),
        }
        self.offset, total = {}, 0
        for name, (numel, dtype) in regions.items():
            self.offset[name] = total
            total += -(-numel * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
        self._buffer, addresses = _allocate(total, self.device, self.group)
        self.shared_bytes = total if self.num_ranks > 1 else 0
        self.peers_W = torch.tensor(addresses, dtype=torch.int64, device=self.device)

    @property
    def _num_announcers(self) -> int:
        return -(-self.capacity * self.top_k // _ANNOUNCED)

    def announce(self, slot_TK, weight_TK) -> tuple[torch.Tensor, torch.Tensor]:
        """As CollectiveTransport.announce."""
        self._follow()
        if self.begins_early and self.is_open:
            # a call was left without its answer: peers may still be in its announcement, though their tokens came
            self._meet()
            self.is_open = False
        shape = self.num_ranks * self.capacity, self.top_k
        local_NK = torch.empty(shape, dtype=torch.int64, device=self.device)
        weight_NK = torch.empty(shape, dtype=torch.float32, device=self.device)
        self._kernels.announce_kernel[(self._num_announcers,)](
            slot_TK, weight_TK, local_NK, weight_NK, self.odd, self.peers_W, self._told, self.ep_rank, slot_TK.numel(),
            self.capacity * self.top_k, self.slots_per_rank, self.offset["copies"], W=self.num_ranks, BLOCK=_ANNOUNCED,
            EARLY=self.begins_early,
        )  # fmt: skip
        return local_NK, weight_NK

    def bound(self, wanted_L, weight_NK, row_bound: int):
        """As CollectiveTransport.bound; the numbers are there when the `bring` that must follow has run."""
        self._wanted_L = wanted_L
        sizes = torch.empty(2, dtype=torch.int32, device=self.device)
        return torch.empty_like(wanted_L), sizes[:1], sizes[1:]

    def bring(self, x_TD, slot_TK, plan: LocalPlan) -> torch.Tensor:
        """As CollectiveTransport.bring; rows that are not in use are not written."""
        rows_RD = torch.empty(plan.row_bound, self.width, dtype=self.dtype, device=self.device)
        wanted_L, self._wanted_L = self._wanted_L, None
        self._spread(x_TD, slot_TK, rows_RD, rows_RD, plan, wanted_L)
        return rows_RD

    def weigh(self, grad_TD, slot_TK, rows_RD, plan: LocalPlan, reuse: bool = False) -> torch.Tensor:
        """As CollectiveTransport.weigh; rows that are not in use are not written."""
        grad_RD = rows_RD if reuse else torch.empty_like(rows_RD)
        if reuse:
            torch.autograd.graph.increment_version(rows_RD)
        self._spread(grad_TD, slot_TK, rows_RD, grad_RD, plan, weigh=True)
        return grad_RD

    def sum_back(self, rows_RD, plan: LocalPlan, slot_TK, told: Told | None = None, grad_TK=None) -> torch.Tensor:
        """As CollectiveTransport.sum_back."""
        y_TD = torch.empty(slot_TK.shape[0], self.width, dtype=self.dtype, device=self.device)
        on_host, most = (self.odd, self.odd) if told is None else (told.on_host, told.most)
        self._begin(opens=False)
        order = self._mixed_order(_SUMS_AHEAD_BYTES, self.num_ranks - 1, 1) if self.begins_early else (self._lag, 0, 0)
        self._kernels.sum_kernel[self._grid(self.num_ranks)](
            rows_RD, plan.row_NK, plan.weight_NK, y_TD, y_TD if grad_TK is None else grad_TK, slot_TK, plan.num_rows,
            plan.num_needed, on_host, most, self.peers_W, self._calls, self.ep_rank, self.capacity, slot_TK.shape[0],
            self.slots_per_rank, plan.row_bound, self.width, *order, self.offset["sums"], self.offset["grads"],
            self.offset["needed"], self.offset["flags"], WEIGHTED=told is not None, GRADS=grad_TK is not None,
            MIXED=self.begins_early, **self._sizes(),
        )  # fmt: skip
        return y_TD

    def wait(self) -> None:
        """As CollectiveTransport.wait; synchronises with the device."""
        torch.cuda.current_stream(self.device).synchronize()

    def _spread(self, own_TD, slot_TK, rows_RD, grad_RD, plan, wanted_L=None, weigh=False):
        # only right behind what makes the plan: a meeting or a copy between the two would not be complete
        early = self.begins_early and wanted_L is not None and not self.is_open and own_TD.data_ptr() % 16 == 0
        if own_TD.data_ptr() % 16:  # the kernel takes rows of this rank and of others for aligned alike
            own_TD = own_TD.clone()
        self._begin(opens=True)
        order = self._mixed_order(_AHEAD_BYTES, 1, self.num_ranks) if early else (self._lag, 0, 0)
        options = {"launch_pdl": True} if early else {}
        if weigh and self.block_tokens * _power_of_two(self.top_k) * _LEAST_COLUMNS <= _WEIGH_ELEMENTS:
            options["maxnreg"] = _WEIGH_REGISTERS
        self._kernels.spread_kernel[self._grid(self.num_ranks + 1)](
            own_TD, slot_TK, rows_RD, grad_RD, plan.row_NK, plan.weight_NK, plan.count_L if wanted_L is None else wanted_L,
            plan.count_L, plan.num_rows, plan.num_needed, self.odd, self._told, self.peers_W, self._calls, self.ep_rank,
            own_TD.shape[0], self.capacity, self.slots_per_rank, plan.row_bound, self.width, *order, self.offset["tokens"],
            self.offset["grads"], self.offset["flags"], WEIGH=weigh, BOUND=wanted_L is not None,
            EARLY=early, L_PAD=_power_of_two(self.slots_per_rank), BLOCK_W=self._weigh_columns(), **self._sizes(),
            **options,
        )  # fmt: skip

    def _turns_of(self, num_bytes: int) -> int:
        return min(max(num_bytes // (self.block_tokens * self.width * self.dtype.itemsize), 1), self._num_turns)

    def _mixed_order(self, ahead_bytes: int, pushes: int, reads: int) -> tuple[int, int, int]:
        """What `_mixed_piece` takes of turns with so many pushes and reads: ahead, behind, share."""
        ahead, behind = self._turns_of(ahead_bytes), self._turns_of(_BEHIND_BYTES)
        pushes, reads = (self._num_turns - ahead) * pushes, (self._num_turns - behind) * reads
        return ahead, behind, -(-(pushes << 31) // max(pushes + reads, 1))

    def _weigh_columns(self) -> int:
        """Columns of a tile that has all copies of block_tokens tokens."""
        return max(_WEIGH_ELEMENTS // (self.block_tokens * _power_of_two(self.top_k)), _LEAST_COLUMNS)

    def _grid(self, pieces_of_turn: int) -> tuple[int]:
        return (min(self._num_turns * pieces_of_turn, self.max_blocks),)

    def _sizes(self) -> dict:
        return {
            "K": self.top_k, "K_PAD": _power_of_two(self.top_k), "W": self.num_ranks, "W_PAD": _power_of_two(self.num_ranks),
            "BLOCK_T": self.block_tokens, "BLOCK_D": self.block_d, "num_warps": _NUM_WARPS,
        }  # fmt: skip

    def _follow(self) -> None:
        """Go on behind the last call, whatever stream it was on."""
        stream = torch.cuda.current_stream(self.device)
        if self._stream not in (None, stream) and not torch.cuda.is_current_stream_capturing():
            stream.wait_stream(self._stream)
        self._stream = stream

    def _begin(self, opens: bool) -> None:
        """Before a call that fills tokens (`opens`) or sums: see that the two alternate."""
        self._follow()
        if self.is_open == opens and self.num_ranks > 1:
            # a call was left without its answer: peers may still read the region that this one fills
            self._meet()
        self.is_open = opens

    def _meet(self) -> None:
        self._kernels.meet_kernel[(1,)](self.peers_W, self._met, self.ep_rank, self.offset["met"], W=self.num_ranks)


def _allocate(num_bytes: int, device, group) -> tuple[torch.Tensor, list[int]]:
    """A zeroed buffer on every rank, and the address of each rank's as this process sees it. Collective."""
    if group_size(group) == 1:
        buffer = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        return buffer, [buffer.data_ptr()]
    if device.type != "cuda":
        raise ValueError(
            f"memory that all ranks reach: it is asked for on {device}, and only GPUs have it: build the layer where it shall "
            'run, MoELayer(.., device="cuda")'
        )
    import torch.distributed._symmetric_memory as symmetric_memory

    buffer = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
    try:
        handle = symmetric_memory.rendezvous(buffer, group)
    except RuntimeError as error:
        if "overlapping devices" not in str(error):
            raise
        raise ValueError(
            "direct dispatcher: two ranks of the group are on one GPU: give each its own (torch.cuda.set_device), or, to try "
            "it on one GPU however slowly, set TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1"
        ) from error
    buffer.zero_()
    bases = [handle.get_buffer(peer, (1,), torch.uint8).data_ptr() for peer in range(group_size(group))]
    # the tensor may stand inside a larger allocation, at the same place on every rank
    shift = buffer.data_ptr() - bases[group_rank(group)]
    torch.cuda.synchronize(device)
    dist.barrier(group)
    return buffer, [base + shift for base in bases]


def _num_processors(device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _can_begin_early(device) -> bool:
    """Whether a kernel may begin before the one before it is complete (programmatic dependent launch)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def _column_block(width: int, most: int) -> int:
    """Columns that a block moves at once, a tile that leaves no lane idle or one that covers odd widths. Narrow tiles have more
    tokens, which more than two ranks need: each gets few of a turn's."""
    exact = [block for block in (2048, 1024, 512, 256, 128) if width % block == 0 and block <= most]
    return exact[0] if exact else min(_power_of_two(width), most, 1024)
