"""How token copies travel to their experts and back: one mechanism per file, all with the same result.

A dispatcher is called as dispatcher(x_TD, routing, slot_of_expert_E, experts) -> y_TD on every rank of its group.
Shape letters are those of `smartmoe.ops`.
"""

from __future__ import annotations

from smartmoe.config import ClusterSpec, LayerConfig
from smartmoe.dispatch.basic import BasicDispatcher
from smartmoe.dispatch.overlapped import OverlappedDispatcher
from smartmoe.dispatch.padded import PaddedDispatcher
from smartmoe.dispatch.shadow import ShadowCost


def build_dispatcher(layer: LayerConfig, ep_group, *, slots_per_rank: int, cluster: ClusterSpec | None = None):
    """The dispatcher that `layer` names, over `ep_group` (None = this process alone), for `slots_per_rank` slots a
    rank.

    `cluster`: bandwidth and speed for the shadowing decision, needed by layer.shadowing only. Raises ValueError for
    an unknown name, or shadowing without a cluster.
    """
    if layer.dispatcher == "basic":
        return BasicDispatcher(ep_group, slots_per_rank)
    if layer.dispatcher == "padded":
        return PaddedDispatcher(ep_group, slots_per_rank)
    if layer.dispatcher == "overlapped":
        if layer.shadowing and cluster is None:
            raise ValueError(
                "layer.shadowing: the decision needs the speed of the cluster, pass cluster = ClusterSpec(...)"
            )
        cost = ShadowCost.of(cluster) if layer.shadowing else None
        return OverlappedDispatcher(ep_group, slots_per_rank, num_groups=layer.overlap_groups, shadow_cost=cost)
    raise ValueError(f'layer.dispatcher = "{layer.dispatcher}" is not one of basic, overlapped, padded')
