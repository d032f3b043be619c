"""What `--smartmoe` means: a RunConfig from Megatron's own arguments and a system's name or a TOML file, and what does not
go together, said before any process group is made."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from pathlib import Path

from smartmoe import config as configs
from smartmoe import systems
from smartmoe.config import (
    ClusterSpec,
    GateConfig,
    LayerConfig,
    ModelConfig,
    OnlineConfig,
    ParallelPlan,
    RunConfig,
    Workload,
)
from smartmoe.data import CACHE_DIR

HOST_ONLY = "megatron"  # Megatron's own MoE layer, with SmartMoE's run directory
TABLES = ("system", "layer", "online")
PRESETS = tuple(name for name, system in systems.SYSTEMS.items() if not system.host)


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add SmartMoE's arguments to Megatron's."""
    group = parser.add_argument_group(title="smartmoe")
    group.add_argument(
        "--smartmoe",
        metavar="SYSTEM|TOML",
        type=_system_or_file,
        default="smartmoe",
        help=f'which MoE layer trains: "{HOST_ONLY}" (Megatron\'s own), one of {", ".join(PRESETS)}, or a TOML '
        f"file with the keys {', '.join(TABLES)}; plan, model and workload are Megatron's arguments (default: smartmoe)",
    )
    group.add_argument(
        "--smartmoe-run",
        metavar="DIR",
        type=Path,
        default=None,
        help="run directory to write: run.json, train.log, metrics.jsonl, events.jsonl (default: none)",
    )
    group.add_argument(
        "--smartmoe-text",
        metavar="FILE",
        nargs="*",
        default=None,
        help="train on these text files, or without any on the Python standard library's source, instead of --data-path",
    )
    group.add_argument(
        "--smartmoe-same-start",
        action="store_true",
        help="begin with the same experts whichever layer trains: with --smartmoe megatron, Megatron's experts get the first "
        "values of SmartMoE's (other weights begin alike anyhow, except with --use-cpu-initialization, where Megatron draws "
        "them and its experts one after the other from one stream)",
    )
    group.add_argument(
        "--smartmoe-cache",
        metavar="DIR",
        default=CACHE_DIR,
        help=f"where tokenised text is kept (default: {CACHE_DIR})",
    )
    for action in parser._actions:  # megatron-core 0.19 has per cent signs that --help stumbles over
        action.help = re.sub(
            r"%%|%\(\w+\)[sdrf]|%", lambda found: found[0] if found[0] != "%" else "%%", action.help or ""
        )
    return parser


def _system_or_file(name: str) -> str:
    try:
        _asked(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


def run_config(args: argparse.Namespace) -> RunConfig:
    """The run that Megatron's validated `args` and `args.smartmoe` describe.

    Raises ValueError for what does not fit: the sizes, the system, or arguments of Megatron that SmartMoE's layer does not
    have. The router stays Megatron's, so `gate` tells of it no more than capacity and scope.
    """
    asked = _asked(args.smartmoe)
    is_ours = asked["system"] != HOST_ONLY
    problems = _data_problems(args) + (_problems(args) if is_ours else [])
    problems += _online_problems(args, asked) if is_ours else []
    if problems:
        raise ValueError("--smartmoe " + str(args.smartmoe) + ": " + "; ".join(problems))
    parts = {
        "model": _model(args),
        "gate": GateConfig(
            kind="naive", capacity=args.moe_expert_capacity_factor, scope="local", balance_weight=_balance_weight(args)
        ),
        "workload": _workload(args),
        "cluster": _cluster(args),
    }
    plan = ParallelPlan(
        pp=args.pipeline_model_parallel_size,
        vpp=args.virtual_pipeline_model_parallel_size or 1,
        dp=args.data_parallel_size * args.context_parallel_size,
        tp=args.tensor_model_parallel_size,
        ep=args.expert_model_parallel_size,
        recompute=args.recompute_granularity is not None,
    )
    if not is_ours:
        run = RunConfig(system=HOST_ONLY, plan=plan, layer=LayerConfig(dispatcher="basic", experts="loop"), **parts)
        return configs.check(run, f"--smartmoe {HOST_ONLY}")
    run = systems.build(asked["system"], plan=plan, online=asked.get("online"), **parts)
    layer = asked.get("layer", run.layer)
    if layer.dispatcher in ("direct", "auto") and layer.row_factor < plan.ep:
        raise ValueError(
            f"--smartmoe {args.smartmoe}: layer.row_factor = {layer.row_factor} is too little for some routings, and Megatron "
            f"does not repeat a step: set it to {plan.ep}, the number of expert-parallel ranks"
        )
    is_repeated = args.recompute_granularity == "full" or "moe" in (getattr(args, "recompute_modules", None) or ())
    if plan.recompute and is_repeated and layer.dispatcher == "pipelined" and not layer.overlap_degree:
        raise ValueError(
            f"--smartmoe {args.smartmoe}: layer.overlap_degree is tried out in passes with gradients, and Megatron's "
            "recomputation has none but repetitions: leave --recompute-granularity out, or set layer.overlap_degree in a file"
        )
    return configs.check(dataclasses.replace(run, layer=layer, gate=parts["gate"]), f"--smartmoe {args.smartmoe}")


def _asked(name: str) -> dict:
    if not name.endswith((".toml", ".json")):
        return {"system": _known(name)}
    table = configs.read_table(name)
    wrong = [key for key in table if key not in TABLES]
    if wrong:
        raise ValueError(
            f"{name}: {', '.join(wrong)}: plan, model, gate and workload are Megatron's arguments here; this file may have "
            f"{', '.join(TABLES)}"
        )
    kinds = {"layer": LayerConfig, "online": OnlineConfig}
    parsed = {
        key: configs.from_dict(kinds[key], value, f"{name}: {key}") for key, value in table.items() if key in kinds
    }
    asked = {"system": "smartmoe", **table, **parsed}
    return {**asked, "system": _known(asked["system"])}


def _known(name: str) -> str:
    if name != HOST_ONLY and name not in PRESETS:
        raise ValueError(f'"{name}" is not one of {HOST_ONLY}, {", ".join(PRESETS)}, nor a .toml file')
    return name


def _problems(args) -> list[str]:
    """Arguments of Megatron that SmartMoE's layer does not have, and what to take instead."""
    problems = []
    if not args.num_experts:
        problems.append("there are no experts: give --num-experts")
    if args.add_bias_linear:
        problems.append("experts have no biases here: add --disable-bias-linear")
    if not (args.swiglu or args.openai_gelu):
        problems.append("experts know silu gates and the tanh form of gelu: add --swiglu or --openai-gelu")
    if args.expert_tensor_parallel_size != 1:
        problems.append("experts are whole on their rank: add --expert-tensor-parallel-size 1")
    if args.tensor_model_parallel_size > 1 and not args.sequence_parallel:
        problems.append("tensor-parallel ranks would all send the same tokens to the experts: add --sequence-parallel")
    if args.context_parallel_size > 1:
        problems.append("--context-parallel-size must be 1")
    if args.moe_pad_expert_input_to_capacity:
        problems.append("--moe-pad-expert-input-to-capacity is the work of dispatchers here: leave it out")
    for name in (
        "moe_shared_expert_intermediate_size", "moe_latent_size", "mtp_num_layers", "use_megatron_fsdp",
        "use_torch_fsdp2", "overlap_moe_expert_parallel_comm", "moe_apply_probs_on_input", "moe_input_jitter_eps",
        "squared_relu", "quick_geglu", "activation_func_clamp_value", "glu_linear_offset", "moe_use_upcycling",
        "moe_mlp_glu_interleave_size", "moe_expert_rank_capacity_factor",
    ):  # fmt: skip
        if getattr(args, name, None):
            problems.append(f"--{name.replace('_', '-')} is not available: leave it out")
    if getattr(args, "cuda_graph_impl", None) not in (None, "none"):
        problems.append("layers with experts are not captured here: leave --cuda-graph-impl out")
    if getattr(args, "fp8", None) or getattr(args, "fp4", None):
        problems.append("experts in fp8 or fp4 are not available: leave --fp8-format and --fp4-format out")
    if (args.virtual_pipeline_model_parallel_size or 1) > 1 and not args.overlap_p2p_comm:
        problems.append(
            "interleaved pipelines with batched point-to-point calls exchange wrong gradients at 2 stages: leave "
            "--no-overlap-p2p-communication out"
        )
    return problems


def _data_problems(args) -> list[str]:
    """What Megatron's own pretrain_gpt.py makes of its data and this one, whose attention is causal over samples, does not."""
    names = ("reset_attention_mask", "dataloader_inter_document_masking", "sft", "fim_data", "per_dataset_sequences_path")
    return [
        f"--{name.replace('_', '-')} is not available: leave it out" for name in names if getattr(args, name, None)
    ]


def _online_problems(args, asked: dict) -> list[str]:
    """What stands in the way of moving experts while Megatron trains."""
    online, problems = asked.get("online"), []
    if online is not None and online.replicate == "history":
        if args.overlap_grad_reduce:
            problems.append(
                "gradients of copies join their owners' before any is reduced: leave --overlap-grad-reduce out"
            )
        if (args.bf16 or args.fp16) and not args.accumulate_allreduce_grads_in_fp32:
            problems.append("gradients of copies are summed in float32: add --accumulate-allreduce-grads-in-fp32")
    if online is not None and online.replicate != "never" and args.overlap_param_gather:
        problems.append("copies are sent when weights are in place: leave --overlap-param-gather out")
    moves = systems.get(asked["system"]).online
    if moves and args.overlap_param_gather:
        problems.append("experts move between steps, when weights must be in place: leave --overlap-param-gather out")
    if moves and args.async_save:
        problems.append("experts stand in plain order while a checkpoint is written: leave --async-save out")
    if moves and args.use_precision_aware_optimizer:
        problems.append("--use-precision-aware-optimizer keeps states that cannot be moved: leave it out")
    if moves and args.optimizer_cpu_offload:
        problems.append("--optimizer-cpu-offload keeps states that cannot be moved: leave it out")
    if moves and args.num_distributed_optimizer_instances > 1:
        problems.append("--num-distributed-optimizer-instances must be 1")
    return problems


def _model(args) -> ModelConfig:
    every = args.moe_layer_freq
    every = every if isinstance(every, int) else max(1, len(every) // max(1, sum(every)))
    return ModelConfig(
        name="megatron",
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_size=args.moe_ffn_hidden_size or args.ffn_hidden_size,
        num_heads=args.num_attention_heads,
        seq_len=args.seq_length,
        vocab_size=args.padded_vocab_size or args.vocab_size,
        num_experts=args.num_experts or 1,
        top_k=args.moe_router_topk,
        moe_every=every,
        activation="swiglu" if args.swiglu else "gelu",
        expert_bias=args.add_bias_linear,
    )


def _balance_weight(args) -> float:
    coefficient = args.moe_aux_loss_coeff
    return float(sum(coefficient) if isinstance(coefficient, list) else coefficient)


def _workload(args) -> Workload:
    dtype = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    # of --train-samples Megatron makes iterations later
    iterations = args.train_iters or max(1, (args.train_samples or 0) // args.global_batch_size)
    return Workload(
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.micro_batch_size,
        iterations=iterations,
        warmup_iterations=min(5, iterations - 1),
        seed=args.seed,
        dtype=dtype,
        lr=args.lr or 0.0,
        min_lr=args.min_lr or 0.0,
        lr_warmup_iterations=args.lr_warmup_iters or 0,
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_eps=args.adam_eps,
        clip_grad=args.clip_grad,
        data=tuple(args.smartmoe_text or ()),
        checkpoint_interval=(args.save_interval or 0) if args.save else 0,
    )


def _cluster(args) -> ClusterSpec:
    import torch

    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size))
    is_gpu = torch.cuda.is_available()
    return ClusterSpec(
        name="megatron",
        device="cuda" if is_gpu else "cpu",
        num_nodes=-(-args.world_size // per_node),
        ranks_per_node=per_node,
        intra_node_gbytes_per_s=300.0 if is_gpu else 1.0,
        inter_node_gbytes_per_s=25.0 if is_gpu else 1.0,
        tflops=400.0 if is_gpu else 0.02,
        memory_gbytes=torch.cuda.get_device_properties(0).total_memory / 1e9 if is_gpu else 4.0,
    )
