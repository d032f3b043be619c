"""Layers with replicated experts against the oracle, forward and backward, and what travels for it."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.autograd import Variable
from torch.utils.checkpoint import checkpoint

from smartmoe.config import ClusterSpec, GateConfig, LayerConfig, OnlineConfig, RunConfig, Workload
from smartmoe.ops.replica_exchange import Transfers, _batches, return_grads
from smartmoe.placement import Placement, Replicas
from smartmoe.replicas import ExactReplication, Plan, copy_cost, return_all, send_all
from tests import oracle
from tests.dist import spawn
from tests.test_layer import MECHANISMS, MODEL, make_config, make_layer, make_tokens, run_layer

EXPERT_BYTES = 4 * (2 * 16 * 24 + 16 + 24)
NAMES = ("w1_LDF", "b1_LF", "w2_LFD", "b2_LD")
GATES = {
    "naive": GateConfig(kind="naive"),
    "dropping": GateConfig(kind="naive", capacity=0.5),
    "one expert": GateConfig(kind="zero"),
}
DISPATCH = {
    **{name: layer for name, layer in MECHANISMS.items() if name != "shadowing"},
    "direct": LayerConfig(dispatcher="direct", row_factor=4.0),
}
PAIRS = [(mechanism, gate) for mechanism in DISPATCH for gate in GATES if mechanism == "basic" or gate == "dropping"]
PAIRS.append(("direct", "one expert"))


def share_out(placement: Placement, expert_of_replica: list[int], seed: int = 0) -> Replicas:
    """Replicas whose hosts get random shares, other ones from every source; the first source sends to owners only."""
    rng = np.random.default_rng(seed)
    hosts_EW = np.eye(placement.num_ranks)[placement.rank_of_expert()]
    num_replicas = len(expert_of_replica) // placement.num_ranks
    for slot, expert in enumerate(expert_of_replica):
        if expert >= 0:
            hosts_EW[expert, slot // num_replicas] = 1
    share_SEW = rng.random((placement.num_ranks, *hosts_EW.shape)) * hosts_EW
    share_SEW[0] = np.eye(placement.num_ranks)[placement.rank_of_expert()]
    return Replicas(tuple(expert_of_replica), share_SEW / share_SEW.sum(2, keepdims=True))


def everywhere(placement: Placement, expert: int, num_replicas: int) -> list[int]:
    """The expert in the last replica slot of all ranks but its owner's."""
    slots = []
    for ep_rank in range(placement.num_ranks):
        hosts = ep_rank != placement.rank_of_expert()[expert]
        slots += [-1] * (num_replicas - 1) + [expert if hosts else -1]
    return slots


def replica_tables(placement: Placement) -> dict[str, Replicas]:
    """What the tests put into two replica slots a rank."""
    foreign = [[e for e in range(6) if e not in placement.experts_of_rank(r)] for r in range(placement.num_ranks)]
    full = [e for experts in foreign for e in (experts[-1:] + experts[:1] if len(experts) > 1 else [-1, -1])]
    return {
        "nothing": Replicas.none(placement, 2),
        "hot expert everywhere": share_out(placement, everywhere(placement, 0, 2)),
        "all slots": share_out(placement, full, seed=1),
    }


def replicated(mode: str, mechanism: str, gate: str) -> RunConfig:
    online = OnlineConfig(replicate=mode, replica_slots=2)
    return dataclasses.replace(make_config(gate=GATES[gate]), online=online, layer=DISPATCH[mechanism])


def experts_of(layer, tensors) -> dict:
    """(logical expert, parameter) -> this rank's part of tensors [L, ...]."""
    slots = enumerate(layer.placement.experts_of_rank(layer.ep_group.rank() if layer.ep_group else 0))
    return {(e, name): t[s] for s, e in slots if e >= 0 for name, t in zip(NAMES, tensors, strict=True)}


def check_copies(layer, expert_of_replica) -> None:
    """Every replica slot in use holds the weights of its owner, bit for bit."""
    mine, group = experts_of(layer, [p.detach() for p in layer.experts.weights()]), layer.ep_group
    every = [None] * group.size()
    dist.all_gather_object(every, mine, group=group)
    weights = {key: weight for part in every for key, weight in part.items()}
    for index, expert in enumerate(expert_of_replica[2 * group.rank() :][:2]):
        for name, storage in zip(NAMES, layer.experts.storages, strict=True):
            if expert >= 0:
                assert torch.equal(storage[layer.placement.slots_per_rank + index], weights[expert, name])


class IntoGrad:
    """A sink (ops.grad_sink) that sums in the parameter's grad."""

    is_urgent, held_G = False, None

    def __init__(self, param, may_end_late=False):
        self.param, self.may_end_late = param, may_end_late

    def take(self):
        is_first = self.param.grad is None
        if is_first:
            self.param.grad = torch.full_like(self.param, torch.nan)
        return self.param.grad, is_first


class LateExact(ExactReplication):
    """Gradients are under way until the backward pass has ended; only there they are added."""

    journeys = ()

    def return_grads(self, plan, grads):
        self.journeys = [*self.journeys, (plan, grads)]

    def wait_grads(self):
        raise AssertionError("nothing needs to wait")

    def leave_grads(self, read):
        assert self.journeys and read[0] is self.journeys[0][0]
        Variable._execution_engine.queue_callback(self.arrive)

    def arrive(self):
        for plan, grads in self.journeys:
            super().return_grads(plan, grads)
        self.journeys = ()


def run_both_modes(world_rank, num_ranks):
    results = run_history(world_rank, num_ranks)
    for mechanism, gate in PAIRS:
        layer = make_layer(replicated("exact", mechanism, gate), num_ranks, shuffled=True)
        for variant in ("plain", "recomputed", "early", "early into sums", "late", "late, recomputed"):
            layer.zero_grad()
            layer.replication.is_early = variant.startswith(("early", "late"))
            if variant == "early into sums":
                layer.experts.w1_LDF.grad_sink, layer.experts.w2_LFD.grad_sink = map(
                    IntoGrad, (layer.experts.w1_LDF, layer.experts.w2_LFD)
                )
            if variant == "late":
                for param in layer.experts.weights():
                    param.grad_sink = IntoGrad(param, may_end_late=True)
                layer.replication.__class__ = LateExact
            results[gate, mechanism, "exact", variant] = run_layer(layer, world_rank, recompute="recomputed" in variant)
            if num_ranks > 1:
                check_copies(layer, layer.replication._held)
                assert (np.array(layer.replication._held) >= 0).any()
    for gate in GATES:
        plain = make_layer(make_config(gate=GATES[gate]), num_ranks, shuffled=True)
        results[gate, "plain"] = run_layer(plain, world_rank)
    return results


def run_history(world_rank, num_ranks):
    results = {}
    for mechanism, gate in PAIRS:
        layer = make_layer(replicated("history", mechanism, gate), num_ranks, shuffled=True)
        for name, replicas in replica_tables(layer.placement).items():
            layer.zero_grad()
            layer.set_replicas(replicas)
            sent = send_all([layer.replication], layer.ep_group)
            result = run_layer(layer, world_rank, recompute=name == "all slots")
            if num_ranks > 1:
                check_copies(layer, replicas.expert_of_replica)
            grads = [param.grad for param in layer.experts.weights()]
            returned = return_all([layer.replication], [grads], layer.ep_group)
            assert not any(grad.any() for grad in layer.replication.grads)
            result |= {"experts": experts_of(layer, grads), "bytes": (sent, returned, replicas.num_copies)}
            results[gate, mechanism, name] = result
    check_travelling_dtype(layer)
    return results


def check_travelling_dtype(layer):
    """Gradients in float32 may travel in another dtype: here 1 + 2^-9, which bfloat16 rounds to 1."""
    placement, rank = layer.placement, layer.ep_group.rank() if layer.ep_group else 0
    moves = Transfers.of(placement, replica_tables(placement)["hot expert everywhere"], rank)
    owned, copies = torch.full((placement.slots_per_rank, 3), 0.25), torch.full((2, 3), 1 + 2**-9)
    sent = return_grads([([owned], [copies], moves)], layer.ep_group, torch.bfloat16)
    hosts = placement.num_ranks - 1
    if placement.rank_of_expert()[0] == rank:
        assert sent == 0 and owned[placement.primary[0] % placement.slots_per_rank].tolist() == [hosts + 0.25] * 3
    else:
        assert sent == 3 * 2 and (owned == 0.25).all()


@pytest.mark.parametrize("num_ranks", [1, 3, 4])
def test_replicas_equal_the_oracle(num_ranks):
    results_W = [run_both_modes(0, 1)] if num_ranks == 1 else spawn(run_both_modes, num_ranks, num_ranks)
    check_results(results_W)
    check_bytes(results_W)


def check_results(results_W):
    answers = {gate: expected_of([results[gate, "plain"] for results in results_W], gate) for gate in GATES}
    for key in results_W[0]:
        outputs, experts = answers[key[0]]
        for rank, results in enumerate(results_W):
            for name in ("y", "x"):
                got = results[key][name].flatten(0, 1)
                oracle.assert_close(got, outputs[rank][name], torch.float32, f"{key} rank {rank} {name}")
            for param, grad in results[key]["experts"].items():
                oracle.assert_close(grad, experts[param], torch.float32, f"{key} rank {rank} {param}")


def check_bytes(results_W):
    """Over all ranks as much returns as was sent, one expert for each replica."""
    for key in results_W[0]:
        if "bytes" in results_W[0][key]:
            sent, returned, _ = np.sum([results[key]["bytes"] for results in results_W], axis=0)
            assert sent == returned == results_W[0][key]["bytes"][2] * EXPERT_BYTES


def test_a_copy_costs_what_is_computed_meanwhile():
    node = ClusterSpec(tflops=700.0, intra_node_gbytes_per_s=450.0, inter_node_gbytes_per_s=50.0)
    half = Workload(dtype="bfloat16")
    assert copy_cost(RunConfig(cluster=node, workload=half)) == round(2 * 700e12 / (3 * 450e9))
    assert copy_cost(RunConfig(cluster=node)) == round(4 * 700e12 / (3 * 450e9))
    nodes = dataclasses.replace(node, num_nodes=2)
    assert copy_cost(RunConfig(cluster=nodes, workload=half)) == round(2 * 700e12 / (3 * 50e9))


def run_gates(world_rank):
    """Every gate, with replicas and without."""
    results = {}
    for kind in ("noisy", "switch", "gshard", "swipe", "faster"):
        model = dataclasses.replace(MODEL, top_k=1 if kind == "switch" else 2)
        for mode in ("never", "history", "exact"):
            config = make_config(model=model, gate=GateConfig(kind=kind, capacity=0.9))
            if mode != "never":
                config = dataclasses.replace(config, online=OnlineConfig(replicate=mode, replica_slots=2))
            layer = make_layer(config, 3, shuffled=True)
            if mode == "history":
                layer.set_replicas(replica_tables(layer.placement)["all slots"])
                send_all([layer.replication], layer.ep_group)
            result = run_layer(layer, world_rank)
            grads = [param.grad for param in layer.experts.weights()]
            if mode == "history":
                return_all([layer.replication], [grads], layer.ep_group)
            result["experts"] = experts_of(layer, grads)
            results[kind, mode] = result
    return results


def test_every_gate_is_served():
    for rank, results in enumerate(spawn(run_gates, 3)):
        for (kind, mode), result in results.items():
            plain = results[kind, "never"]
            assert torch.equal(result["choice"], plain["choice"]), (kind, mode)
            for name in ("y", "x"):
                oracle.assert_close(result[name], plain[name], torch.float32, f"{kind} {mode} rank {rank} {name}")
            for key, grad in plain["experts"].items():
                oracle.assert_close(result["experts"][key], grad, torch.float32, f"{kind} {mode} {key}")


def test_layers_travel_together_unless_one_rank_sends_much_more_than_it_holds():
    def entry(*num_sent_W):
        return [torch.zeros(6, 1)], 4, Transfers(((),) * 3, ((),) * 3, num_sent_W)

    assert _batches([entry(0, 0, 0)] * 2, 2) == []
    even = [entry(2, 2, 2), entry(0, 0, 0), entry(4, 1, 1)]
    assert _batches(even, 2) == [[even[0], even[2]]]
    hot = [entry(4, 0, 0), entry(4, 1, 0), entry(4, 0, 0), entry(4, 0, 0)]
    assert _batches(hot, 2) == [hot]
    assert _batches(hot[:3], 1) == [[each] for each in hot[:3]]
    hotter = [entry(6, 0, 0), entry(6, 0, 0), entry(0, 6, 0)]
    assert _batches(hotter, 2) == [hotter]


def check_unused_weights(layer):
    """Weights that were sent and never used are there for a pass that needs some of them again."""
    replication, placement = layer.replication, layer.placement
    num_bytes, plans = replication.num_bytes, []
    for chosen in ("all slots", "hot expert everywhere"):
        replicas = replica_tables(placement)[chosen]
        plans.append(Plan(replicas, Transfers.of(placement, replicas, layer.ep_group.rank()), None))
    with torch.no_grad():
        for storage in layer.experts.storages:
            storage[placement.slots_per_rank :] = torch.nan
    slots = np.array([plan.replicas.expert_of_replica for plan in plans])
    assert ((slots[0] == slots[1]) & (slots[0] >= 0)).any(), "nothing that both want"
    replication.send_weights(plans[0])
    replication.restore_weights(plans[1])
    replication.wait_weights()
    check_copies(layer, plans[1].replicas.expert_of_replica)
    replication.num_bytes = num_bytes


def run_interleaved(world_rank):
    """Three micro-batches in flight, as in a pipeline: all forward passes, then all backward passes."""
    results = {}
    for mechanism, recompute in (("basic", False), ("basic", True), ("direct", False), ("plain", False)):
        config = make_config() if mechanism == "plain" else replicated("exact", mechanism, "naive")
        layer = make_layer(config, 3, shuffled=True)
        inputs = [make_tokens(world_rank + 3 * micro) for micro in range(3)]
        favour = 3 * torch.nn.functional.normalize(layer.gate.weight_ED.detach())  # another expert in each micro-batch
        xs = [(x.float() + favour[micro]).requires_grad_() for micro, (x, _, _) in enumerate(inputs)]
        outputs, held = [], []
        for x, (_, _, ids) in zip(xs, inputs, strict=True):
            outputs.append((checkpoint(layer, x, ids, use_reentrant=False) if recompute else layer(x, ids))[0])
            held.append(getattr(layer.replication, "_held", ()))
        assert len(set(held)) == (1 if mechanism == "plain" else 3)
        for y, (_, grad, _) in zip(outputs, inputs, strict=True):
            y.backward(grad.float())
        experts = experts_of(layer, [param.grad for param in layer.experts.weights()])
        results[mechanism, recompute] = {"x": torch.stack([x.grad for x in xs]), **experts}
        if mechanism == "basic" and not recompute:
            check_unused_weights(layer)
        if mechanism != "plain":
            num_copies = sum(np.count_nonzero(np.array(experts) >= 0) for experts in held)
            results["bytes", mechanism, recompute] = (layer.replication.num_bytes, num_copies * EXPERT_BYTES)
    return results


def test_micro_batches_in_flight_find_their_own_replicas_again():
    results_W = spawn(run_interleaved, 3)
    for results in results_W:
        for case in (("basic", False), ("basic", True), ("direct", False)):
            for key, want in results["plain", False].items():
                oracle.assert_close(results[case][key], want, torch.float32, f"{case} {key}")
    for recompute in (False, True):
        sent, copies = np.sum([results["bytes", "basic", recompute] for results in results_W], axis=0)
        passes = sent / (copies / 3)  # every rank knows of all copies
        # Weights, what differs of them again, gradients; a recomputed pass sends all weights itself, once.
        assert passes == 3 if recompute else 2 < passes <= 3


def expected_of(results_W, gate):
    """By rank the output and the gradient of the input, and the experts' gradients, from the oracle."""
    held = {key: weight for results in results_W for key, weight in results["weights"].items()}
    weights = [torch.stack([held[e, name].double() for e in range(6)]).requires_grad_() for name in NAMES]
    router = [p.detach().double() for p in make_layer(make_config()).gate.parameters()]
    outputs = []
    for rank, results in enumerate(results_W):
        x, grad, _ = make_tokens(rank)
        x = x.flatten(0, 1).requires_grad_()
        choice = results["choice"]
        if gate == "one expert":
            weight = torch.full(choice.shape, 0.5, dtype=torch.float64)
        else:  # a dropped copy leaves the weights of the others as they are
            chosen = (x @ router[0].t() + router[1]).argsort(1, descending=True)[:, :2]
            weight = oracle.naive_weights(x, *router, chosen).masked_fill(choice < 0, 0)
        y = oracle.moe(x, choice, weight, weights)
        (y * grad.flatten(0, 1)).sum().backward()
        outputs.append({"y": y.detach(), "x": x.grad})
    return outputs, {(e, name): w.grad[e] for name, w in zip(NAMES, weights, strict=True) for e in range(6)}
