"""The MoE layer of the benchmark in two back ends that compute the same: DeepSpeed's own, and SmartMoE's layer inside the
DeepSpeed engine.

Both: experts H -> 8H -> H with biases and an activation, a float32 router without bias, top-2 of all tokens of a rank's
micro-batch, the second expert drawn by Gumbel noise (or argmax), at most 2 T / E copies of an expert, kept weights
renormalised to 1. Initial values depend on (seed, layer, logical expert, name) alone. Shape letters are those of
`smartmoe.ops`.
"""

from __future__ import annotations

from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import nn

from smartmoe.config import ClusterSpec, GateConfig, LayerConfig, ModelConfig, ParallelPlan, RunConfig, Workload
from smartmoe.dispatch.basic import BasicDispatcher
from smartmoe.dispatch.direct import DirectDispatcher
from smartmoe.hosts.deepspeed.moe import DeepSpeedMoE, create_expert_groups
from smartmoe.hosts.deepspeed_alpa.gumbel import DeepSpeedGumbelGate
from smartmoe.hosts.deepspeed_alpa.options import BACKENDS
from smartmoe.hosts.deepspeed_alpa.suites import TOP_K, Case
from smartmoe.layer import MoELayer


class SmartMoE(MoE):
    """SmartMoE's layer as the DeepSpeed engine knows layers of experts: by this base class, and parameters that say which
    of DeepSpeed's expert groups they are reduced over. Nothing else of the base class is used."""

    def __init__(self, config: RunConfig, layer_idx: int, *, sample: bool, device):
        nn.Module.__init__(self)
        model, ep = config.model, config.plan.ep
        self.num_experts, self.ep_size, self.num_local_experts = model.num_experts, ep, model.num_experts // ep
        self.expert_group_name = create_expert_groups(ep)
        ep_group = groups._get_expert_parallel_group(self.expert_group_name) if ep > 1 else None
        self.layer = MoELayer(config, layer_idx=layer_idx, ep_group=ep_group, device=device)
        self.layer.gate = DeepSpeedGumbelGate(
            model, config.gate, sample=sample, layer_idx=layer_idx, seed=config.workload.seed, seq_len=model.seq_len,
            device=device,
        )  # fmt: skip
        if isinstance(self.layer.dispatcher, DirectDispatcher):
            # capacity 1 gives no rank more than an even share: asking would make the host wait in each call measured
            self.layer.dispatcher.num_careful = 0
        for param in self.layer.experts.parameters():
            param.allreduce, param.group_name = False, self.expert_group_name

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The engine asks every layer to make its groups: the layer was built with them."""
        if use_data_before_expert_parallel_:
            raise ValueError("use_data_before_expert_parallel is not supported: expert groups are runs of ranks")

    def forward(self, x_BTD, token_id_BT):
        return self.layer(x_BTD, token_id_BT)


def check_waits_for_nothing(model: nn.Module) -> None:
    """Raise ValueError when the exchange of one of SmartMoE's layers in `model` makes the host wait for the device, so that
    it cannot be captured."""
    for layer in (module.layer for module in model.modules() if isinstance(module, SmartMoE)):
        if isinstance(layer.dispatcher, BasicDispatcher):
            raise ValueError(
                "--capture: the ranks do not reach each other's memory, and the exchange that is left makes the host wait for "
                "sizes: take --dispatcher padded, or leave --capture out"
            )


def build_moe(backend: str, config: RunConfig, layer_idx: int, *, sample: bool, device) -> MoE:
    """The MoE layer of `backend`, called as layer(x_BTD, token_id_BT) -> (y_BTD, 0-dim balance loss).

    config: from `layer_config`. sample: draw the second expert. Collective over the world (DeepSpeed's groups are made).
    """
    if backend not in BACKENDS:
        raise ValueError(f'back end "{backend}" is not one of {", ".join(BACKENDS)}')
    if backend == "deepspeed":
        return DeepSpeedMoE(config, layer_idx, capacity=1.0, sample=sample, device=device)
    return SmartMoE(config, layer_idx, sample=sample, device=device)


def layer_config(case: Case, *, dispatcher: str, activation: str, seed: int, ranks_per_node: int) -> RunConfig:
    """What SmartMoE's layer reads, for one case of the benchmark."""
    model = case.model
    return RunConfig(
        system="smartmoe",
        model=ModelConfig(
            name=model.name, num_layers=model.num_layers, hidden_size=model.hidden_size, ffn_size=model.ffn_size,
            num_heads=model.num_heads, seq_len=model.seq_len, vocab_size=model.vocab_size,
            num_experts=model.num_experts, top_k=TOP_K, moe_every=2, activation=activation,
        ),
        gate=GateConfig(kind="naive", capacity=1.0, scope="local"),
        layer=LayerConfig(dispatcher=dispatcher),
        workload=Workload(global_batch_size=case.batch_size, micro_batch_size=case.micro_batch_size, seed=seed),
        plan=ParallelPlan(dp=case.num_gpus, ep=case.ep, recompute=True),
        cluster=ClusterSpec(num_nodes=-(-case.num_gpus // ranks_per_node), ranks_per_node=ranks_per_node),
    )  # fmt: skip
