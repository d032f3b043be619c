"""Tutel's exchange: equal buffers in pieces, experts computing while other pieces travel, or the experts' weights travel; what
is fastest is tried out."""

from __future__ import annotations

import torch
import torch.distributed as dist

from smartmoe.dispatch.degree_search import DEGREES, Choice, DegreeSearch, Trial
from smartmoe.mesh import reduce_scatter
from smartmoe.ops.all_to_all import gather_all, group_rank, group_size, start_exchange, wait_exchange
from smartmoe.ops.permute import combine, permute
from smartmoe.ops.plan import count_slots, make_padded_plan


class PipelinedDispatcher:
    """Exchange of [slots, capacity] buffers in `degree` pieces along the capacity: while experts compute one piece, others
    travel on the stream of the collectives. Source: Tutel (Hwang et al., MLSys 2023).

    The capacity is the gate's own bound on the copies from one rank for one expert (`routing.max_copies`), and without one
    the largest count of any rank and slot: one all-reduce and one host synchronisation. It is rounded up to whole pieces.
    degree: 1, 2, 4 or 8, or 0 = the fastest, tried out for each window of capacities in the first passes with gradients at
    it (`DegreeSearch`): after such a trial the host waits for the device and ranks agree by an all-reduce. Where the group
    spans nodes with equally many ranks each, an exchange may also travel in two steps, to the ranks of the own node first,
    then to ranks of the same place on other nodes: fewer, larger messages between nodes; that is tried out, too. So is data
    parallelism of experts (`weights_travel`) where the weights are fewer bytes than the rows: each rank gathers all weights,
    computes its own rows, and gradients are summed at the owners; that is Tutel's P1. Its P2, experts that several ranks
    share, is for fewer experts than ranks, which no plan here has; its fast encode and decode are `permute` and `combine`.
    Collective over the group: 2 * degree all-to-alls of equal parts (twice as many in two steps), or a gathering of weights.
    """

    def __init__(self, ep_group, slots_per_rank: int, degree: int = 0, node_of_rank_W: tuple[int, ...] | None = None):
        self.group, self.slots_per_rank = ep_group, slots_per_rank
        self.num_ranks, self.ep_rank = group_size(ep_group), group_rank(ep_group)
        self.ranks_per_node = ranks_per_node(node_of_rank_W or (0,) * self.num_ranks)
        self.search = DegreeSearch(self._choices(degree))
        self._trials: list[Trial] = []

    def _choices(self, degree: int) -> tuple[Choice, ...]:
        if degree not in (0, *DEGREES):
            raise ValueError(f"degree = {degree} is not 0 (searched) or one of {', '.join(map(str, DEGREES))}")
        if self.num_ranks == 1:
            return (Choice(1),)  # nothing travels
        degrees = (degree,) if degree else DEGREES
        ways = (False, True) if 1 < self.ranks_per_node < self.num_ranks else (False,)
        data_parallel = () if degree else (Choice(1, weights_travel=True),)
        return (*(Choice(each, way) for way in ways for each in degrees), *data_parallel)

    @property
    def num_trial_passes(self) -> int:
        """Passes with gradients at one capacity after which its choice is settled."""
        return len(self.search.choices) * self.search.num_trials if len(self.search.choices) > 1 else 0

    def __call__(self, x_TD, routing, slot_TK, experts):
        """As BasicDispatcher.__call__, with the same result but for the order in which a weight's gradient is summed over
        pieces."""
        repeats = torch._C._current_graph_task_id() != -1  # activations computed again: with the choice of the first time
        if not repeats:
            self._settle_trials()
        capacity = routing.max_copies or self._largest_count(slot_TK)
        choice, is_trial = self.search.choose(capacity, self._out_of_question(capacity, experts))
        if not is_trial or repeats or not (x_TD.requires_grad and torch.is_grad_enabled()):
            return self._carry(x_TD, routing.weight_TK, slot_TK, experts, capacity, choice)
        trial = Trial(capacity, choice, x_TD.is_cuda)
        y_TD = self._carry(trial.enter(x_TD), routing.weight_TK, slot_TK, experts, capacity, choice)
        self._trials.append(trial)
        return trial.leave(y_TD)

    def _out_of_question(self, capacity: int, experts) -> tuple[Choice, ...]:
        """Weights do not travel where rows are fewer bytes, both ways and back, nor those of experts with copies."""
        if not (hasattr(experts, "weights") and hasattr(experts, "compute")):
            return tuple(choice for choice in self.search.choices if choice.weights_travel)
        first = capacity // self.search.window * self.search.window  # one answer for a window
        w1_LDF, _, w2_LFD, _ = experts.weights()
        numel_weights = 2 * (w1_LDF.numel() + w2_LFD.numel())  # gathered, and their gradients summed
        numel_rows = 4 * self.slots_per_rank * first * w1_LDF.shape[1]
        return tuple(choice for choice in self.search.choices if choice.weights_travel and numel_weights >= numel_rows)

    def _settle_trials(self) -> None:
        """Tell the search of trials that are over. Collective over the group when there are some, which all ranks know."""
        over = [trial for trial in self._trials if trial.is_done]
        if not over:
            return
        self._trials = [trial for trial in self._trials if not trial.is_done]
        is_cuda = dist.get_backend(self.group) == "nccl"
        ms = torch.tensor([trial.ms() for trial in over], dtype=torch.float64, device="cuda" if is_cuda else "cpu")
        dist.all_reduce(ms, op=dist.ReduceOp.MAX, group=self.group)
        for trial, each in zip(over, ms.tolist(), strict=True):
            self.search.tell(trial.capacity, trial.choice, each)

    def _largest_count(self, slot_TK) -> int:
        # one row at least, so that no tensor of the exchange is empty
        largest = count_slots(slot_TK, self.num_ranks * self.slots_per_rank).max().clamp(min=1)
        if self.num_ranks > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.group)
        return int(largest)

    def _carry(self, x_TD, weight_TK, slot_TK, experts, capacity: int, choice: Choice) -> torch.Tensor:
        """The order of the calls is the schedule, and its reverse is the schedule of backward."""
        if choice.weights_travel:
            return self._carry_weights(x_TD, weight_TK, slot_TK, experts, capacity)
        degree, width = choice.degree, x_TD.shape[1]
        per_piece = -(-capacity // degree)
        num_slots = self.num_ranks * self.slots_per_rank
        plan = make_padded_plan(slot_TK, num_slots, degree * per_piece)
        rows = permute(x_TD, plan)
        pieces = rows.view(num_slots, degree, per_piece, width).unbind(1) if degree > 1 else [rows]
        ways = [Way(self, self.slots_per_rank * per_piece, choice.in_two_steps) for _ in pieces]
        sent = [way.start(piece.reshape(-1, width)) for way, piece in zip(ways, pieces, strict=True)]
        count_L = torch.full((self.slots_per_rank,), self.num_ranks * per_piece, device=slot_TK.device)
        back = []
        for step in range(degree + 1):
            if step < degree:
                sent[step] = ways[step].turn(sent[step])
            if step:
                rows = self._by_slot(ways[step - 1].finish(sent[step - 1]), per_piece)
                back.append(ways[step - 1].start_back(self._by_source(experts(rows, count_L), per_piece)))
        back = [way.turn_back(rows) for way, rows in zip(ways, back, strict=True)]
        done = [way.finish_back(rows).view(num_slots, per_piece, width) for way, rows in zip(ways, back, strict=True)]
        rows = torch.stack(done, 1) if degree > 1 else done[0]
        return combine(rows.view(-1, width), weight_TK, plan)

    def _carry_weights(self, x_TD, weight_TK, slot_TK, experts, capacity: int) -> torch.Tensor:
        num_slots = self.num_ranks * self.slots_per_rank
        weights = [None if each is None else _Gather.apply(each, self.group) for each in experts.weights()]
        plan = make_padded_plan(slot_TK, num_slots, capacity)
        count_S = torch.full((num_slots,), capacity, device=slot_TK.device)
        return combine(experts.compute(permute(x_TD, plan), count_S, weights), weight_TK, plan)

    def _by_slot(self, rows_RD, per_piece: int):
        """Rows by (source rank, slot) to rows by (slot, source rank)."""
        shape = (self.num_ranks, self.slots_per_rank, per_piece, rows_RD.shape[1])
        return rows_RD.view(shape).transpose(0, 1).reshape(-1, shape[3])

    def _by_source(self, rows_RD, per_piece: int):
        shape = (self.slots_per_rank, self.num_ranks, per_piece, rows_RD.shape[1])
        return rows_RD.view(shape).transpose(0, 1).reshape(-1, shape[3])


class Way:
    """One piece's way to the experts and back: start, turn, finish, and the same back. An exchange in one step turns
    nowhere. Parts, of `part_rows` rows for each rank, lie by rank at both ends."""

    def __init__(self, owner: PipelinedDispatcher, part_rows: int, in_two_steps: bool):
        self.group, self.in_two_steps = owner.group, in_two_steps
        num_ranks, per_node, mine = owner.num_ranks, owner.ranks_per_node, owner.ep_rank
        self._grid = (num_ranks // per_node, per_node)  # ranks by (node, place on it)
        self._part_rows = part_rows
        if not in_two_steps:
            self._first = self._second = [part_rows] * num_ranks
            return
        node, place = divmod(mine, per_node)
        inside = [part_rows * self._grid[0] if rank // per_node == node else 0 for rank in range(num_ranks)]
        across = [part_rows * per_node if rank % per_node == place else 0 for rank in range(num_ranks)]
        self._first, self._second = inside, across

    def start(self, rows_RD):
        return start_exchange(self._flip(rows_RD, self._grid), self._first, self._first, self.group)

    def turn(self, sent):
        """Rows from the ranks of this node, each for (places of other nodes), go on to those nodes."""
        if not self.in_two_steps:
            return sent
        rows = self._flip(wait_exchange(*sent), self._grid[::-1])
        return start_exchange(rows, self._second, self._second, self.group)

    def finish(self, sent):
        return wait_exchange(*sent)

    def start_back(self, rows_RD):
        return start_exchange(rows_RD, self._second, self._second, self.group)

    def turn_back(self, sent):
        if not self.in_two_steps:
            return sent
        rows = self._flip(wait_exchange(*sent), self._grid)
        return start_exchange(rows, self._first, self._first, self.group)

    def finish_back(self, sent):
        return self._flip(wait_exchange(*sent), self._grid[::-1])

    def _flip(self, rows_RD, grid):
        """Parts by (a, b) to parts by (b, a), where they travel in two steps."""
        if not self.in_two_steps:
            return rows_RD
        parts = rows_RD.view(*grid, self._part_rows, rows_RD.shape[1])
        return parts.transpose(0, 1).reshape(rows_RD.shape)


class _Gather(torch.autograd.Function):
    """The weights of all ranks' slots [W * L, ...]; gradients are summed at their owner."""

    @staticmethod
    def forward(ctx, weight, group):
        ctx.group = group
        return gather_all(weight, group)

    @staticmethod
    def backward(ctx, grad):
        part = grad.new_empty(grad.shape[0] // ctx.group.size(), *grad.shape[1:])
        reduce_scatter(part, grad.contiguous(), ctx.group)
        return part, None


def ranks_per_node(node_of_rank_W: tuple[int, ...]) -> int:
    """Ranks on each node where neighbouring ranks share nodes of equal size; else all of them, as if on one node."""
    num_ranks = len(node_of_rank_W)
    size = node_of_rank_W.count(node_of_rank_W[0])
    runs = [node_of_rank_W[start : start + size] for start in range(0, num_ranks, size)]
    is_regular = all(len(set(run)) == 1 and len(run) == size for run in runs) and len({run[0] for run in runs}) == len(runs)
    return size if is_regular else num_ranks
