"""A run of ours in Megatron-LM's words, and what Megatron's own layer cannot do of it. Never imports torch."""

from __future__ import annotations

from pathlib import Path

from smartmoe.config import LayerConfig, RunConfig

OWN = LayerConfig(dispatcher="basic", experts="loop")  # what SmartMoE's layer would call Megatron's way
GATES = ("naive", "gshard")


def problems(config: RunConfig) -> list[str]:
    """Why Megatron's loop and own MoE layer cannot do this run; each says how to mend it. Empty when they can."""
    model, work, plan = config.model, config.workload, config.plan
    found = []
    if config.cluster.device != "cuda":
        found.append("Megatron-LM trains on GPUs: take another system on a CPU")
    if config.gate.kind not in GATES:
        found.append(
            f'gate.kind = "{config.gate.kind}" is not one that Megatron\'s router has: take {", ".join(GATES)}'
        )
    if config.gate.scope == "global" and config.gate.capacity is not None and plan.stage_size > 1:
        found.append('gate.scope = "global": Megatron limits each rank by itself: set gate.scope = "local"')
    if model.activation not in ("gelu", "swiglu"):
        found.append(f'model.activation = "{model.activation}": Megatron has gelu and swiglu')
    if plan.tp > 1:
        found.append(f"plan.tp = {plan.tp}: Megatron needs Transformer Engine or Apex for it: set plan.tp = 1")
    if plan.vpp > 1 and plan.pp == 2:
        found.append("plan.vpp with plan.pp = 2: Megatron exchanges wrong gradients there: set plan.vpp = 1")
    if config.online.policy != "static" or config.online.replicate != "never":
        found.append('online placement needs SmartMoE\'s layer: leave [online] out, or take system "smartmoe"')
    if config.layer not in (LayerConfig(), OWN):
        found.append("[layer] is about SmartMoE's layer, and this is Megatron's: leave it out")
    if work.lr_warmup_iterations >= work.iterations:
        found.append("workload.lr_warmup_iterations must be below workload.iterations")
    if work.zero > 1:
        found.append(f"workload.zero = {work.zero}: Megatron's distributed optimizer is stage 1: take 0 or 1")
    for key in ("record_trace", "record_spans"):
        if getattr(config, key):
            found.append(f"{key} needs SmartMoE's layer: leave it out")
    return found


def words(config: RunConfig, run_dir: Path, resume: bool = False) -> list[str]:
    """Megatron's command line for `config`, whose files go to `run_dir`.

    Its router, losses and capacity are Megatron's: the top-k of the logits and a softmax over them; with "gshard" the
    auxiliary loss, and no random second expert.
    """
    model, work, plan = config.model, config.workload, config.plan
    pattern = [int(layer % model.moe_every == model.moe_every - 1) for layer in range(model.num_layers)]
    values = {
        "num-layers": model.num_layers, "hidden-size": model.hidden_size, "num-attention-heads": model.num_heads,
        "ffn-hidden-size": model.ffn_size, "moe-ffn-hidden-size": model.ffn_size, "num-experts": model.num_experts,
        "moe-layer-freq": str(pattern).replace(" ", ""), "moe-router-topk": model.top_k,
        "seq-length": model.seq_len, "max-position-embeddings": model.seq_len, "vocab-size": model.vocab_size,
        "tokenizer-type": "NullTokenizer", "make-vocab-size-divisible-by": 1, "transformer-impl": "local",
        "micro-batch-size": work.micro_batch_size, "global-batch-size": work.global_batch_size,
        "train-iters": work.iterations, "seed": work.seed, "lr": work.lr, "min-lr": work.min_lr,
        "lr-decay-style": "cosine", "lr-warmup-iters": work.lr_warmup_iterations, "weight-decay": work.weight_decay,
        "adam-beta1": work.adam_beta1, "adam-beta2": work.adam_beta2, "adam-eps": work.adam_eps,
        "clip-grad": work.clip_grad, "init-method-std": 0.02, "hidden-dropout": 0, "attention-dropout": 0,
        "eval-iters": 0, "eval-interval": 1_000_000, "log-interval": 1_000_000, "num-workers": 0,
        "pipeline-model-parallel-size": plan.pp, "tensor-model-parallel-size": plan.tp,
        "expert-model-parallel-size": plan.ep, "expert-tensor-parallel-size": 1,
        "moe-token-dispatcher-type": "alltoall", "smartmoe": config.system, "smartmoe-run": run_dir,
    }  # fmt: skip
    flags = [
        "untie-embeddings-and-output-weights", "no-persist-layer-norm", "no-gradient-accumulation-fusion",
        "no-masked-softmax-fusion", "no-rope-fusion", "no-bias-gelu-fusion",
        "swiglu" if model.activation == "swiglu" else "openai-gelu",
    ]  # fmt: skip
    if config.gate.kind == "gshard":
        values |= {"moe-router-load-balancing-type": "aux_loss", "moe-aux-loss-coeff": config.gate.balance_weight}
    else:
        values["moe-router-load-balancing-type"] = "none"
    if config.gate.capacity is not None:
        values |= {"moe-expert-capacity-factor": config.gate.capacity, "moe-token-drop-policy": "position"}
    if plan.vpp > 1:
        values["num-virtual-stages-per-pipeline-rank"] = plan.vpp
    if work.zero:
        flags += ["use-distributed-optimizer", "dist-ckpt-optim-fully-reshardable"]
    if work.dtype != "float32":
        flags.append("bf16" if work.dtype == "bfloat16" else "fp16")
    if work.dtype == "float16":
        values["initial-loss-scale"] = work.initial_loss_scale
    if plan.recompute:
        values |= {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
    if not model.expert_bias:
        flags.append("disable-bias-linear")
    checkpoints = run_dir / "checkpoints"
    if work.checkpoint_interval:
        values |= {"save": checkpoints, "save-interval": work.checkpoint_interval}
    if resume and (checkpoints / "latest_checkpointed_iteration.txt").exists():
        values["load"] = checkpoints
    line = [word for key, value in values.items() for word in (f"--{key}", str(value))]
    return [*line, *(f"--{flag}" for flag in flags), "--smartmoe-text", *work.data]
