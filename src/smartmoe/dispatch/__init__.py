"""How token copies travel to their experts and back: one mechanism per file, all with the same result.

A dispatcher is called as dispatcher(x_TD, routing, slot_TK, experts) -> y_TD on every rank of its group;
slot_TK says where each copy goes.
Shape letters are those of `smartmoe.ops`.
"""

from __future__ import annotations

import functools
import logging

import torch.distributed as dist

from smartmoe.config import DISPATCHERS, ClusterSpec, LayerConfig
from smartmoe.dispatch.basic import BasicDispatcher
from smartmoe.dispatch.direct import DirectDispatcher
from smartmoe.dispatch.overlapped import OverlappedDispatcher
from smartmoe.dispatch.padded import PaddedDispatcher
from smartmoe.dispatch.pipelined import PipelinedDispatcher
from smartmoe.dispatch.shadow import ShadowCost
from smartmoe.dispatch.symmetric import why_unavailable
from smartmoe.ops.all_to_all import group_size

_log = logging.getLogger(__name__)


def build_dispatcher(layer: LayerConfig, ep_group, *, slots_per_rank: int, cluster: ClusterSpec | None = None):
    """The dispatcher that `layer` names, over `ep_group` (None = this process alone), for `slots_per_rank` slots a
    rank.

    `cluster`: bandwidth and speed for the shadowing decision, needed by layer.shadowing only, and which ranks share a node,
    for "pipelined". "auto" is collective over the group. Raises ValueError for an unknown name, or shadowing without a cluster.
    """
    if layer.dispatcher == "auto":
        slow = cluster is not None and cluster.slow_links_gbytes_per_s
        reason = "links are slowed down" if slow else why_unavailable(ep_group, over_nvlink=True)
        _log_choice("direct" if reason is None else f"basic: {reason}")
        if reason is not None:
            return BasicDispatcher(ep_group, slots_per_rank)
    if layer.dispatcher in ("direct", "auto"):
        return DirectDispatcher(ep_group, slots_per_rank, layer.row_factor)
    if layer.dispatcher == "basic":
        return BasicDispatcher(ep_group, slots_per_rank)
    if layer.dispatcher == "padded":
        return PaddedDispatcher(ep_group, slots_per_rank)
    if layer.dispatcher == "pipelined":
        nodes = nodes_of(ep_group, cluster.ranks_per_node) if cluster else None
        return PipelinedDispatcher(ep_group, slots_per_rank, layer.overlap_degree, nodes)
    if layer.dispatcher == "overlapped":
        if layer.shadowing and cluster is None:
            raise ValueError(
                "layer.shadowing: the decision needs the speed of the cluster, pass cluster = ClusterSpec(...)"
            )
        cost = ShadowCost.of(cluster) if layer.shadowing else None
        return OverlappedDispatcher(ep_group, slots_per_rank, num_groups=layer.overlap_groups, shadow_cost=cost)
    raise ValueError(f'layer.dispatcher = "{layer.dispatcher}" is not one of {", ".join(DISPATCHERS)}')


def nodes_of(ep_group, ranks_per_node: int) -> tuple[int, ...]:
    """The node of each rank of the group."""
    if group_size(ep_group) == 1:
        return (0,)
    return tuple(world_rank // ranks_per_node for world_rank in dist.get_process_group_ranks(ep_group))


@functools.cache
def _log_choice(choice: str) -> None:
    """Once for each choice, not once for each layer."""
    _log.info("layer.dispatcher = auto: %s", choice)
