"""Where each expert lives: the ownership of logical experts by slots, and the replicas that help it.

Layer 0: numpy only. Names: E logical experts, W ranks of an expert-parallel group, S the same ranks as sources of tokens,
L owned slots per rank, N = W * L slots, G replica slots per rank, B buckets. Slot = ep_rank * L + index on that rank.
With replicas a rank has L + G physical slots, and physical slot = ep_rank * (L + G) + index, the replicas' after the
owned. Loads are token copies, of any unit, as long as they add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

EMPTY = -1
BUCKETS = 256  # in how many parts the copies of an expert are split over its hosts


@dataclass(frozen=True)
class Placement:
    """Which logical expert each slot of an expert-parallel group hosts.

    Args:
        num_ranks: ranks W of the group.
        expert_of_slot: [N] logical expert of each slot, -1 = empty. Experts are 0 .. E-1 without gaps; one may sit in
            several slots, at most once on a rank: one of them is its primary, the others are replicas.
        primary: [E] primary slot of each expert; left out, the first slot that hosts it.

    Raises ValueError naming the slot or the expert that does not fit.
    """

    num_ranks: int
    expert_of_slot: tuple[int, ...]
    primary: tuple[int, ...] | None = None

    def __post_init__(self):
        experts = _int_tuple(self.expert_of_slot, "expert_of_slot")
        _check_slots(self.num_ranks, experts)
        # backwards, as of equal keys the last one stays
        first = dict(zip(reversed(experts), range(len(experts) - 1, -1, -1), strict=True))
        first.pop(EMPTY, None)
        missing = sorted(set(range(max(first, default=-1) + 1)) - set(first))
        if missing or not first:
            raise ValueError(f"placement: no slot hosts experts {missing or 'of any number'}; all 0 .. E-1 need one")
        default = tuple(map(first.__getitem__, range(len(first))))
        primary = default if self.primary is None else _int_tuple(self.primary, "primary")
        if len(primary) != len(first):
            raise ValueError(f"placement: primary names {len(primary)} experts, the slots host {len(first)}")
        for expert, slot in enumerate(primary):
            if not 0 <= slot < len(experts) or experts[slot] != expert:
                raise ValueError(f"placement: primary slot {slot} of expert {expert} does not host it")
        object.__setattr__(self, "expert_of_slot", experts)
        object.__setattr__(self, "primary", primary)

    @classmethod
    def identity(cls, num_experts: int, num_ranks: int) -> Placement:
        """Experts in order, spread over the ranks as evenly as possible; a rank short of one ends in an empty slot.

        Args:
            num_experts: E, at least 1.
            num_ranks: W, at least 1. Slots per rank are ceil(E / W).
        """
        if num_experts < 1 or num_ranks < 1:
            raise ValueError(f"placement: {num_experts} experts on {num_ranks} ranks: both must be at least 1")
        slots_per_rank, slots, start = -(-num_experts // num_ranks), [], 0
        for ep_rank in range(num_ranks):
            count = num_experts // num_ranks + (ep_rank < num_experts % num_ranks)
            slots += [*range(start, start + count), *[EMPTY] * (slots_per_rank - count)]
            start += count
        return cls(num_ranks, tuple(slots))

    @property
    def num_slots(self) -> int:
        return len(self.expert_of_slot)

    @property
    def slots_per_rank(self) -> int:
        return len(self.expert_of_slot) // self.num_ranks

    @property
    def num_experts(self) -> int:
        return len(self.primary)

    @property
    def primary_slot_E(self) -> np.ndarray:
        """[E] int64, the slot to which the tokens of each expert go."""
        return np.array(self.primary, dtype=np.int64)

    def rank_of_expert(self) -> np.ndarray:
        """[E] int64, read-only: the ep_rank of each expert's primary slot."""
        return self._owner_E

    @cached_property
    def _hosts(self) -> set[tuple[int, int]]:
        """(ep_rank, expert) of each filled slot."""
        slots, per_rank = enumerate(self.expert_of_slot), self.slots_per_rank
        return {(slot // per_rank, expert) for slot, expert in slots if expert != EMPTY}

    @cached_property
    def _owner_E(self) -> np.ndarray:
        owner_E = self.primary_slot_E // self.slots_per_rank
        owner_E.setflags(write=False)
        return owner_E

    def experts_of_rank(self, ep_rank: int) -> tuple[int, ...]:
        """The [L] slots of one rank, in order: logical experts, replicas included, -1 = empty."""
        if not 0 <= ep_rank < self.num_ranks:
            raise ValueError(f"placement: ep_rank {ep_rank} is not in 0 .. {self.num_ranks - 1}")
        return self.expert_of_slot[ep_rank * self.slots_per_rank : (ep_rank + 1) * self.slots_per_rank]

    def to_dict(self) -> dict:
        return {"num_ranks": self.num_ranks, "expert_of_slot": list(self.expert_of_slot), "primary": list(self.primary)}

    @classmethod
    def from_dict(cls, data: dict) -> Placement:
        """The inverse of `to_dict`; raises ValueError when a key or the placement is not right."""
        known = {"num_ranks", "expert_of_slot", "primary"}
        if not isinstance(data, dict) or set(data) != known:
            got = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"placement: expected the keys {sorted(known)}, got {got}")
        return cls(data["num_ranks"], data["expert_of_slot"], data["primary"])


@dataclass(frozen=True, eq=False)
class Replicas:
    """Copies of experts on ranks that do not own them, and how each source's tokens are split over the hosts.

    Args:
        expert_of_replica: [W * G] logical expert copied into each replica slot, rank by rank, -1 = empty. Never twice on
            a rank, never one that the rank owns.
        share_SEW: [W, E, W] float64, of the copies of expert e that source rank s holds, which fraction is computed on
            rank w. Rows sum to 1; non-zero only where w owns e or has a replica of it. Kept read-only.

    Raises ValueError for anything else, as far as it shows without the placement; `check` does the rest.
    """

    expert_of_replica: tuple[int, ...]
    share_SEW: np.ndarray

    def __post_init__(self):
        replicas, share = _int_tuple(self.expert_of_replica, "expert_of_replica"), self.share_SEW
        if not isinstance(share, np.ndarray) or share.dtype != np.float64 or share.ndim != 3:
            raise ValueError("replicas: share_SEW must be a float64 array [ranks, experts, ranks]")
        if share.shape[0] != share.shape[2] or 0 in share.shape:
            raise ValueError(f"replicas: share_SEW has shape {share.shape}, expected [ranks, experts, ranks]")
        if len(replicas) % self.num_ranks:
            raise ValueError(f"replicas: {len(replicas)} replica slots do not divide over {self.num_ranks} ranks")
        if share.flags.writeable:
            share = share.copy()
            share.setflags(write=False)
        object.__setattr__(self, "expert_of_replica", replicas)
        object.__setattr__(self, "share_SEW", share)
        self._check_shares()

    def _check_shares(self) -> None:
        """Every row sums to 1, and at most one rank per expert, its owner, has a share without having a replica."""
        rows = _distinct_rows(self.share_SEW)
        if not (rows.min() >= 0 and abs(rows.sum(axis=2) - 1.0).max() <= 1e-9):
            raise ValueError("replicas: the shares of every source and expert must be at least 0 and sum to 1")
        is_owner_EW = rows.any(axis=0) & (self._replica_EW() == EMPTY)
        num_owners_E = np.bincount(is_owner_EW.ravel().nonzero()[0] // self.num_ranks, minlength=1)
        if num_owners_E.max() > 1:
            expert = int(num_owners_E.argmax())
            raise ValueError(f"replicas: expert {expert} has shares on {num_owners_E[expert]} ranks without a replica")

    @classmethod
    def none(cls, placement: Placement, num_replica_slots: int) -> Replicas:
        """Nothing replicated: G = num_replica_slots empty slots on each rank, all tokens go to the owners."""
        if num_replica_slots < 0:
            raise ValueError(f"replicas: num_replica_slots = {num_replica_slots} must be at least 0")
        num_ranks, num_experts = placement.num_ranks, placement.num_experts
        share_EW = np.zeros((num_experts, num_ranks))
        share_EW[np.arange(num_experts), placement.rank_of_expert()] = 1.0
        return cls((EMPTY,) * (num_ranks * num_replica_slots), for_all_sources(share_EW))

    @property
    def num_ranks(self) -> int:
        return self.share_SEW.shape[0]

    @property
    def num_experts(self) -> int:
        return self.share_SEW.shape[1]

    @property
    def num_replica_slots(self) -> int:
        """G, replica slots of each rank, empty ones included."""
        return len(self.expert_of_replica) // self.num_ranks

    @property
    def num_copies(self) -> int:
        """How many replica slots hold an expert."""
        return sum(expert != EMPTY for expert in self.expert_of_replica)

    def experts_of_rank(self, ep_rank: int) -> tuple[int, ...]:
        """The [G] replica slots of one rank, in order: logical experts, -1 = empty."""
        if not 0 <= ep_rank < self.num_ranks:
            raise ValueError(f"replicas: ep_rank {ep_rank} is not in 0 .. {self.num_ranks - 1}")
        return self.expert_of_replica[ep_rank * self.num_replica_slots : (ep_rank + 1) * self.num_replica_slots]

    def check(self, placement: Placement) -> None:
        """Raise ValueError, saying what does not fit, unless these are replicas of what `placement` owns."""
        if (self.num_ranks, self.num_experts) != (placement.num_ranks, placement.num_experts):
            raise ValueError(
                f"replicas: made for {self.num_experts} experts on {self.num_ranks} ranks, "
                f"the placement has {placement.num_experts} on {placement.num_ranks}"
            )
        replica_EW, owner_E = self._replica_EW(), placement.rank_of_expert()
        experts = np.arange(self.num_experts)
        if (at_home := replica_EW[experts, owner_E] >= 0).any():
            expert = int(at_home.argmax())
            raise ValueError(f"replicas: rank {owner_E[expert]} owns expert {expert} and cannot hold a replica of it")
        stray_EW = (_distinct_rows(self.share_SEW) > 0).any(axis=0) & (replica_EW < 0)
        stray_EW[experts, owner_E] = False
        if stray_EW.any():
            expert, ep_rank = np.argwhere(stray_EW)[0].tolist()
            raise ValueError(f"replicas: tokens of expert {expert} go to rank {ep_rank}, which does not host it")

    def slot_EW(self, placement: Placement) -> np.ndarray:
        """[E, W] int64, the physical slot in which rank w hosts expert e (owned or replica), -1 where it does not."""
        self.check(placement)
        owned, extra = placement.slots_per_rank, self.num_replica_slots
        replica_EW = self._replica_EW()
        slot_EW = np.where(replica_EW < 0, EMPTY, np.arange(self.num_ranks) * (owned + extra) + owned + replica_EW)
        primary_E, owner_E = placement.primary_slot_E, placement.rank_of_expert()
        slot_EW[np.arange(self.num_experts), owner_E] = primary_E + owner_E * extra
        return slot_EW

    def bucket_slots(self, placement: Placement, ep_rank: int) -> np.ndarray:
        """The routing table of one source rank: physical slot of every expert and bucket.

        A host gets share * BUCKETS buckets, rounded down; what is missing from BUCKETS goes, one each, to the largest
        fractions cut off (the lowest rank among equals). An expert's buckets follow its hosts by rank.

        Args:
            placement: the ownership that these replicas were made for.
            ep_rank: the source of the tokens.
        Returns: [E, BUCKETS] int64.
        """
        slot_EW = self.slot_EW(placement)
        return np.repeat(slot_EW, bucket_counts(self.share_SEW[ep_rank]).ravel()).reshape(self.num_experts, BUCKETS)

    def host_load(self, count_SE: np.ndarray) -> np.ndarray:
        """[W] float64, token copies that each rank computes.

        Args:
            count_SE: [W, E] token copies of each expert that each source rank holds.
        """
        count_SE = np.asarray(count_SE, dtype=np.float64)
        if count_SE.shape != self.share_SEW.shape[:2]:
            raise ValueError(f"replicas: counts have shape {count_SE.shape}, expected {self.share_SEW.shape[:2]}")
        rows = _distinct_rows(self.share_SEW)
        if len(rows) == 1:
            return np.einsum("e,ew->w", count_SE.sum(axis=0), rows[0])
        return np.dot(count_SE.reshape(1, -1), rows.reshape(-1, self.num_ranks))[0]

    def to_dict(self) -> dict:
        """JSON-ready: for each expert its hosts (ranks with a share) and, per source, their shares; one row where all
        sources split alike."""
        hosts, shares = [], []
        for expert in range(self.num_experts):
            share_SW = self.share_SEW[:, expert]
            ranks = np.flatnonzero(share_SW.any(axis=0))
            same = (share_SW == share_SW[0]).all()
            hosts.append(ranks.tolist())
            shares.append((share_SW[:1] if same else share_SW)[:, ranks].tolist())
        replicas = list(self.expert_of_replica)
        return {"num_ranks": self.num_ranks, "expert_of_replica": replicas, "hosts": hosts, "shares": shares}

    @classmethod
    def from_dict(cls, data: dict) -> Replicas:
        """The inverse of `to_dict`; raises ValueError when a key or a value is not right."""
        known = {"num_ranks", "expert_of_replica", "hosts", "shares"}
        if not isinstance(data, dict) or set(data) != known:
            got = sorted(map(str, data)) if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"replicas: expected the keys {sorted(known)}, got {got}")
        num_ranks, hosts, shares = data["num_ranks"], data["hosts"], data["shares"]
        if not isinstance(num_ranks, int) or isinstance(num_ranks, bool) or num_ranks < 1:
            raise ValueError(f"replicas: num_ranks = {num_ranks!r} must be an integer of at least 1")
        if not isinstance(hosts, list) or not isinstance(shares, list) or len(hosts) != len(shares):
            raise ValueError("replicas: hosts and shares must be lists with one entry per expert")
        share_SEW = np.zeros((num_ranks, len(hosts), num_ranks))
        for expert, (ranks, rows) in enumerate(zip(hosts, shares, strict=True)):
            ranks = _int_tuple(ranks, f"hosts of expert {expert}")
            if any(not 0 <= ep_rank < num_ranks for ep_rank in ranks):
                raise ValueError(f"replicas: hosts {list(ranks)} of expert {expert} are not in 0 .. {num_ranks - 1}")
            try:
                rows = np.array(rows, dtype=np.float64)
            except (TypeError, ValueError):
                raise ValueError(f"replicas: shares of expert {expert} must be rows of numbers") from None
            if rows.shape not in ((1, len(ranks)), (num_ranks, len(ranks))):
                raise ValueError(f"replicas: shares of expert {expert} have shape {rows.shape} for {len(ranks)} hosts")
            share_SEW[:, expert, list(ranks)] = rows
        alike = all(len(rows) == 1 for rows in shares)
        return cls(data["expert_of_replica"], np.broadcast_to(share_SEW[0], share_SEW.shape) if alike else share_SEW)

    def __eq__(self, other) -> bool:
        if not isinstance(other, Replicas):
            return NotImplemented
        same_slots = self.expert_of_replica == other.expert_of_replica
        return same_slots and np.array_equal(self.share_SEW, other.share_SEW)

    def _replica_EW(self) -> np.ndarray:
        """[E, W] int64, index of the replica slot in which rank w has a copy of expert e, -1 = none."""
        expert_N, per_rank = np.array(self.expert_of_replica, dtype=np.int64), max(self.num_replica_slots, 1)
        slots = (expert_N != EMPTY).nonzero()[0]
        experts = expert_N[slots]
        if slots.size and not (experts.min() >= 0 and experts.max() < self.num_experts):
            raise ValueError(f"replicas: expert_of_replica must lie in -1 .. {self.num_experts - 1}")
        ranks = slots // per_rank
        replica_EW = np.full((self.num_experts, self.num_ranks), EMPTY)
        replica_EW[experts, ranks] = slots - ranks * per_rank
        if np.count_nonzero(replica_EW != EMPTY) != slots.size:
            raise ValueError("replicas: an expert sits twice on a rank; one replica a rank is enough")
        return replica_EW


def most_copies(expert_of_replica: Sequence[int], owner_E: np.ndarray, num_ranks: int) -> int:
    """The most copies of experts that one rank sends to others' replica slots or receives in its own.

    Args:
        expert_of_replica: [W * G] as in Replicas.
        owner_E: [E] the rank that owns each expert.
    """
    expert_WG = np.array(expert_of_replica, dtype=np.int64).reshape(num_ranks, -1)
    is_copy_WG = expert_WG != EMPTY
    sent_W = np.bincount(owner_E[expert_WG[is_copy_WG]], minlength=1)
    return int(max(sent_W.max(), is_copy_WG.sum(axis=1).max()))


def for_all_sources(share_EW: np.ndarray) -> np.ndarray:
    """[.., W, E, W] read-only: shares [.., E, W] for each source alike. As np.broadcast_to, which takes ten times as long."""
    *layers, num_experts, num_ranks = share_EW.shape
    *strides, expert, rank = share_EW.strides
    shape = (*layers, num_ranks, num_experts, num_ranks)
    share_SEW = np.ndarray(shape, share_EW.dtype, share_EW, strides=(*strides, 0, expert, rank))
    share_SEW.setflags(write=False)
    return share_SEW


def _distinct_rows(share_SEW: np.ndarray) -> np.ndarray:
    """[1, E, W] where the array is a broadcast, so that all sources split alike, else the whole [W, E, W]."""
    return share_SEW[:1] if share_SEW.strides[0] == 0 else share_SEW


def bucket_counts(share_EW: np.ndarray) -> np.ndarray:
    """[..., W] int64, how many of BUCKETS buckets each host gets; rows of shares sum to 1, rows of counts to BUCKETS."""
    exact = share_EW * BUCKETS
    count = np.floor(exact).astype(np.int64)
    missing = BUCKETS - count.sum(axis=-1, keepdims=True)
    if missing.any():
        order = np.argsort(count - exact, axis=-1, kind="stable")
        np.put_along_axis(
            count, order, np.take_along_axis(count, order, -1) + (np.arange(count.shape[-1]) < missing), -1
        )
    return count


def _int_tuple(values, name: str) -> tuple[int, ...]:
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"placement: {name} must be a list of integers, got {values!r}")
    return tuple(array.tolist())


def _check_slots(num_ranks, experts: tuple[int, ...]) -> None:
    if isinstance(num_ranks, bool) or not isinstance(num_ranks, (int, np.integer)) or num_ranks < 1:
        raise ValueError(f"placement: num_ranks = {num_ranks!r} must be an integer of at least 1")
    if not experts or len(experts) % num_ranks:
        raise ValueError(f"placement: {len(experts)} slots do not divide over {num_ranks} ranks; pad with -1")
    slots_per_rank = len(experts) // num_ranks
    if min(experts) >= EMPTY and max(experts) < len(experts) and _are_distinct(experts):
        return
    hosted: set[tuple[int, int]] = set()
    for slot, expert in enumerate(experts):
        if not EMPTY <= expert < len(experts):
            raise ValueError(f"placement: slot {slot} hosts expert {expert}, which is not in -1 .. {len(experts) - 1}")
        key = (slot // slots_per_rank, expert)
        if expert != EMPTY and key in hosted:
            raise ValueError(f"placement: expert {expert} sits twice on rank {key[0]}; one slot a rank is enough")
        hosted.add(key)


def _are_distinct(experts: tuple[int, ...]) -> bool:
    """Whether no expert sits in two slots."""
    num_empty = experts.count(EMPTY)
    return len(set(experts)) == len(experts) - num_empty + (num_empty > 0)


# ------------------------------------------------------------------------------------------------------- measures


def rank_load(load_E: Sequence[float] | np.ndarray, placement: Placement) -> np.ndarray:
    """Load of each rank when every expert's tokens go to its primary slot.

    Args:
        load_E: [E] token copies (or any additive cost) per logical expert, not negative.
    Returns: [W] float64.
    """
    load_E = check_load(load_E, placement)
    return np.bincount(placement.rank_of_expert(), weights=load_E, minlength=placement.num_ranks)


def max_over_mean(load_E: Sequence[float] | np.ndarray, placement: Placement) -> float:
    """Load of the fullest rank over the mean of the ranks: 1.0 is perfect balance (or no load at all), W the worst."""
    load_W = rank_load(load_E, placement)
    return float(load_W.max() / load_W.mean()) if load_W.any() else 1.0


def num_moves(old: Placement, new: Placement) -> int:
    """How many expert copies must cross ranks to turn `old` into `new`; moves inside a rank are not counted."""
    check_same_shape(old, new)
    return len(new._hosts - old._hosts)


def check_same_shape(old: Placement, new: Placement) -> None:
    """Raise ValueError unless both placements have the same ranks, slots and experts."""
    for key in ("num_ranks", "num_slots", "num_experts"):
        if getattr(old, key) != getattr(new, key):
            raise ValueError(f"placement: {key} changes from {getattr(old, key)} to {getattr(new, key)}; it must not")


def check_load(load_E, placement: Placement) -> np.ndarray:
    """[E] float64, these loads; ValueError unless there is one per expert, finite and not negative."""
    load_E = np.asarray(load_E, dtype=np.float64)
    if load_E.shape != (placement.num_experts,):
        raise ValueError(f"placement: load has shape {load_E.shape}, expected ({placement.num_experts},)")
    if not np.isfinite(load_E).all() or (load_E < 0).any():
        raise ValueError("placement: loads must be finite and not negative")
    return load_E
