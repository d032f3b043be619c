"""What --smartmoe makes of Megatron's arguments, and a run of ours in Megatron's words; without megatron-core."""

import argparse
import contextlib
import dataclasses
import importlib.util
import sys

import pytest
import torch

from smartmoe import systems
from smartmoe.config import ClusterSpec, GateConfig, LayerConfig, ModelConfig, OnlineConfig, ParallelPlan, Workload
from smartmoe.hosts.megatron import limits, options
from smartmoe.hosts.megatron.gate import routing_of

FITTING = {
    "smartmoe": "smartmoe", "num_experts": 8, "add_bias_linear": False, "swiglu": True, "openai_gelu": False,
    "squared_relu": False, "expert_tensor_parallel_size": 1, "context_parallel_size": 1, "fp8": None, "fp4": None,
    "moe_pad_expert_input_to_capacity": False, "overlap_p2p_comm": True, "virtual_pipeline_model_parallel_size": None,
    "overlap_param_gather": False, "async_save": False, "use_precision_aware_optimizer": False,
    "optimizer_cpu_offload": False, "num_distributed_optimizer_instances": 1, "pipeline_model_parallel_size": 2,
    "tensor_model_parallel_size": 1, "expert_model_parallel_size": 2, "data_parallel_size": 2, "world_size": 4,
    "recompute_granularity": None, "moe_layer_freq": [0, 1, 0, 1], "num_layers": 4, "hidden_size": 64,
    "moe_ffn_hidden_size": 128, "ffn_hidden_size": 256, "num_attention_heads": 4, "seq_length": 64, "vocab_size": 512,
    "padded_vocab_size": None, "moe_router_topk": 2, "moe_aux_loss_coeff": [0.01, 0.02], "bf16": True, "fp16": False,
    "moe_expert_capacity_factor": 1.2, "global_batch_size": 16, "micro_batch_size": 2, "train_iters": 20, "seed": 7,
    "train_samples": None, "sequence_parallel": False,
    "lr": 1e-3, "min_lr": None, "lr_warmup_iters": 2, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95,
    "adam_eps": 1e-8, "clip_grad": 1.0, "smartmoe_text": None, "save": None, "save_interval": None,
    "overlap_grad_reduce": False, "accumulate_allreduce_grads_in_fp32": True,
}  # fmt: skip


def arguments(**changes) -> argparse.Namespace:
    return argparse.Namespace(**{**FITTING, **changes})


def test_a_run_is_described_by_megatrons_arguments():
    run = options.run_config(arguments())
    assert run.plan == ParallelPlan(pp=2, dp=2, ep=2) and run.online == OnlineConfig(policy="greedy", interval=10)
    assert (run.model.moe_every, run.model.activation, run.model.ffn_size) == (2, "swiglu", 128)
    assert (run.gate.capacity, run.gate.scope, run.gate.balance_weight) == (1.2, "local", 0.03)
    assert (run.workload.dtype, run.workload.seed, run.workload.iterations) == ("bfloat16", 7, 20)
    by_samples = options.run_config(arguments(train_iters=None, train_samples=163))
    assert by_samples.workload.iterations == 10  # as Megatron counts them
    whole = {"pipeline_model_parallel_size": 1, "data_parallel_size": 4, "expert_model_parallel_size": 4}
    assert options.run_config(arguments(smartmoe="fastmoe", **whole)).layer.experts == "loop"
    own = options.run_config(arguments(smartmoe="megatron", add_bias_linear=True, overlap_param_gather=True))
    assert own.system == "megatron" and own.online.policy == "static"


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"add_bias_linear": True}, "--disable-bias-linear"),
        ({"swiglu": False}, "--openai-gelu"),
        ({"expert_tensor_parallel_size": 2}, "--expert-tensor-parallel-size 1"),
        ({"moe_shared_expert_intermediate_size": 64}, "--moe-shared-expert-intermediate-size is not available"),
        ({"tensor_model_parallel_size": 2}, "add --sequence-parallel"),
        ({"activation_func_clamp_value": 7.0}, "--activation-func-clamp-value is not available"),
        ({"reset_attention_mask": True}, "--reset-attention-mask is not available"),
        ({"smartmoe": "megatron", "dataloader_inter_document_masking": True}, "--dataloader-inter-document-masking"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers is not available"),
        ({"fp8": "hybrid"}, "fp8"),
        ({"cuda_graph_impl": "local"}, "leave --cuda-graph-impl out"),
        ({"overlap_param_gather": True}, "leave --overlap-param-gather out"),
        ({"async_save": True}, "leave --async-save out"),
        ({"virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": False}, "wrong gradients"),
        ({"num_experts": 7}, "plan.ep = 2 does not divide model.num_experts = 7"),
        ({"smartmoe": "fastmoe"}, "has its own plan"),
    ],
)
def test_what_does_not_go_together_is_said_at_once(changes, words):
    with pytest.raises(ValueError, match=words):
        options.run_config(arguments(**changes))


def test_a_file_says_layer_and_placement(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[online]\npolicy = "auto"\ninterval = 5\n[layer]\nexperts = "loop"\n')
    run = options.run_config(arguments(smartmoe=str(file)))
    assert (run.online.policy, run.online.interval, run.layer) == ("auto", 5, LayerConfig(experts="loop"))
    file.write_text('[online]\npolicy = "auto"\nreplicate = "history"\nreplica_slots = 1\n')
    assert options.run_config(arguments(smartmoe=str(file))).online.replica_slots == 1
    for wrong in ({"overlap_grad_reduce": True}, {"accumulate_allreduce_grads_in_fp32": False}):
        with pytest.raises(ValueError, match="gradients of copies"):
            options.run_config(arguments(smartmoe=str(file), **wrong))
    file.write_text('[layer]\ndispatcher = "direct"\nrow_factor = 1.5\n')
    with pytest.raises(ValueError, match="set it to 2"):
        options.run_config(arguments(smartmoe=str(file)))
    for settings, words in (("", "tried out"), ("overlap_degree = 2", "")):
        file.write_text(f'[layer]\ndispatcher = "pipelined"\nexperts = "batched"\n{settings}\n')
        for how, modules in (("full", None), ("selective", ["moe"])):
            again = arguments(smartmoe=str(file), recompute_granularity=how, recompute_modules=modules)
            again.pipeline_model_parallel_size, again.data_parallel_size = 1, 4
            with pytest.raises(ValueError, match=words) if words else contextlib.nullcontext():
                options.run_config(again)
    file.write_text("[plan]\npp = 2\n")
    with pytest.raises(ValueError, match="are Megatron's arguments here"):
        options.run_config(arguments(smartmoe=str(file)))
    file.write_text('[online]\npolcy = "auto"\n')
    with pytest.raises(ValueError, match='did you mean "policy"'):
        options.run_config(arguments(smartmoe=str(file)))


@pytest.mark.parametrize("name", ["smartmo", "deepspeed", "missing.toml"])
def test_a_wrong_name_ends_the_command_with_what_there_is(name, capsys):
    parser = options.add_arguments(argparse.ArgumentParser())
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--smartmoe", name])
    assert ended.value.code == 2 and "argument --smartmoe: " in capsys.readouterr().err


def test_help_survives_per_cent_signs_of_others():
    parser = argparse.ArgumentParser()
    parser.add_argument("--loss", default=3, help="100% (or 5 %) of all, 2%% more; default %(default)s")
    text = options.add_arguments(parser).format_help()
    assert "100% (or 5 %) of all, 2% more; default 3" in text and "smartmoe_static, smartmoe, or a TOML" in text


def test_a_routing_from_megatrons_map():
    chosen_TE = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
    prob_TE = (torch.rand(3, 4) * chosen_TE).requires_grad_()
    routing = routing_of(prob_TE, chosen_TE, top_k=2)
    assert routing.expert_idx_TK.tolist() == [[1, 3], [0, -1], [-1, -1]]  # dropped copies are not sent
    expected_TK = torch.stack([prob_TE[0, [1, 3]], prob_TE[1, [0, 1]], prob_TE[2, [0, 1]]])
    assert torch.equal(routing.weight_TK, expected_TK) and routing.weight_TK.dtype == torch.float32
    routing.weight_TK.sum().backward()
    assert torch.equal(prob_TE.grad[chosen_TE], torch.ones(3)) and routing.balance_loss == 0


# --------------------------------------------------------------------------------------------- a run directory's run


def launched(**changes):
    parts = {
        "model": ModelConfig(num_layers=4, moe_every=2),
        "gate": GateConfig(kind="gshard", capacity=1.2),
        "workload": Workload(dtype="bfloat16", checkpoint_interval=5),
        "cluster": ClusterSpec(device="cuda", ranks_per_node=4),
    }
    return systems.build("megatron", **{**parts, **changes})


def test_a_run_in_megatrons_words(tmp_path):
    line = limits.words(launched(), tmp_path)
    values = dict(zip(line, [*line[1:], ""], strict=True))
    assert values["--moe-layer-freq"] == "[0,1,0,1]" and values["--moe-expert-capacity-factor"] == "1.2"
    assert values["--expert-model-parallel-size"] == "4" and values["--save"] == str(tmp_path / "checkpoints")
    assert {"--openai-gelu", "--use-distributed-optimizer", "--bf16"} <= set(line) and "--load" not in line
    naive = limits.words(launched(gate=GateConfig()), tmp_path)
    assert "none" in naive and "--moe-aux-loss-coeff" not in naive
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("5")
    assert "--load" in limits.words(launched(), tmp_path, resume=True)


def test_what_megatron_cannot_do_is_said_before_it_starts():
    good = launched()
    assert not limits.problems(good)
    change = dataclasses.replace
    for bad, words in (
        (launched(cluster=ClusterSpec()), "GPUs"),
        (change(good, gate=change(good.gate, kind="noisy")), "router"),
        (change(good, gate=change(good.gate, scope="global")), "scope"),
        (change(good, plan=ParallelPlan(dp=2, tp=2, ep=4)), "Transformer Engine"),
        (change(good, plan=ParallelPlan(pp=2, vpp=2, dp=2, ep=2)), "wrong gradients"),
        (change(good, online=OnlineConfig(policy="auto")), "online"),
        (change(good, workload=change(good.workload, zero=2)), "zero"),
        (change(good, record_trace=True), "record_trace"),
    ):
        assert any(words in problem for problem in limits.problems(bad)), words


def test_a_missing_megatron_is_said_with_what_brings_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "smartmoe.hosts.megatron.pretrain_gpt", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"megatron-core is not installed: pip install .*\.\[megatron\]"):
        importlib.import_module("smartmoe.hosts.megatron.pretrain_gpt")
