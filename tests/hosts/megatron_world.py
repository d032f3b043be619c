"""Runs of Megatron-LM's loop in worlds of CPU processes: `python -m tests.hosts.megatron_world FOLDER`, as test_megatron.py
starts it. One process imports Megatron once and forks the ranks of every world; a world runs its cases one after another.

FOLDER gets a run directory for every case, and in error.txt what went wrong.
"""

import dataclasses
import gc
import os
import signal
import sys
import time
import traceback
from collections import Counter
from functools import partial, partialmethod
from pathlib import Path

import torch
import torch.distributed as dist

from smartmoe import record, replicas, systems, timing
from smartmoe.config import ClusterSpec, GateConfig, ModelConfig, Workload, to_dict

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS, MOVE_AT = 10, 5
SIZES = {
    "num-layers": 2, "hidden-size": 32, "num-attention-heads": 2, "seq-length": 16, "max-position-embeddings": 16,
    "micro-batch-size": 1, "global-batch-size": 4, "train-iters": ITERATIONS, "lr": 1e-2, "min-lr": 1e-3,
    "num-experts": 4, "moe-router-topk": 2, "moe-aux-loss-coeff": 1e-2, "moe-ffn-hidden-size": 32, "vocab-size": 512,
    "expert-tensor-parallel-size": 1, "moe-token-dispatcher-type": "alltoall", "eval-iters": 0, "eval-interval": 1000,
    "transformer-impl": "local", "tokenizer-type": "NullTokenizer", "distributed-backend": "gloo", "num-workers": 0,
    "hidden-dropout": 0, "attention-dropout": 0, "ckpt-format": "torch_dist", "log-interval": 1000,
}  # fmt: skip
FLAGS = (
    "swiglu", "disable-bias-linear", "smartmoe-text", "no-persist-layer-norm", "no-gradient-accumulation-fusion",
    "no-masked-softmax-fusion", "no-rope-fusion", "use-cpu-initialization", "untie-embeddings-and-output-weights",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A run: `system` is given to --smartmoe, `words` are further arguments."""

    name: str
    system: str
    words: tuple[str, ...] = ()


MOVING = "moving.toml"
MOVING_TEXT = f"""
system = "smartmoe"
[online]
policy = "greedy"
interval = {MOVE_AT}
"""
LAUNCHED = "launched"  # Megatron's own layer on a run directory, as scripts/launch.py starts it
COPIES = {mode: f"{mode}.toml" for mode in ("history", "exact")}
COPIES_TEXT = """
system = "smartmoe"
[online]
policy = "auto"
migrate = false
interval = 3
replicate = "{mode}"
replica_slots = 1
"""
SYSTEMS = {"megatron": "megatron", "ours": "smartmoe_static", "moving": MOVING}
EP2 = ("--expert-model-parallel-size", "2")
TP2_EP2 = (*EP2, "--tensor-model-parallel-size", "2", "--sequence-parallel", "--moe-expert-capacity-factor", "1.0")
PP2 = ("--pipeline-model-parallel-size", "2")
# without clipping a migration changes no bit: Megatron sums the gradient norm in an order that depends on where experts are
SHARDED = ("--use-distributed-optimizer", "--clip-grad", "0")
CLIPPED = ("--use-distributed-optimizer", "--clip-grad", "0.3", "--train-iters", "2")
HALF = (*EP2, *SHARDED, "--bf16")
RECOMPUTE = ("--recompute-granularity", "selective", "--recompute-modules", "moe")
RESHARDABLE = (*SHARDED, "--dist-ckpt-optim-fully-reshardable")
EVALUATION = ("--eval-iters", "1", "--eval-interval", "1")
SAVE = ("--save", "{folder}/saved-{group}", "--save-interval", str(MOVE_AT))
LOAD = ("--load", "{folder}/saved-saved", "--ckpt-step", str(MOVE_AT))


def plan(name: str, words: tuple[str, ...], systems=tuple(SYSTEMS)) -> list[Case]:
    return [Case(f"{name}-{key}", SYSTEMS[key], words) for key in systems]


def worlds() -> dict[int, list[Case]]:
    """Number of ranks -> the cases that they run."""
    return {
        1: [Case("alone-first", LAUNCHED), Case("alone-second", LAUNCHED)],
        2: [
            *plan("ep2", EP2),
            *plan("tp2", TP2_EP2),
            *plan("half", HALF, ("ours", "moving")),
            *(Case(f"ep2-{mode}", file, EP2) for mode, file in COPIES.items()),
            *(Case(f"half-{mode}", file, HALF) for mode, file in COPIES.items()),
            Case("mock-ours", COPIES["history"], (*EP2, "--mock-data", "--train-iters", "3", *EVALUATION)),
            Case("ended-ours", "smartmoe_static", (*EP2, "--exit-interval", "2")),
            Case("launched-megatron", LAUNCHED),
            *plan(
                "start",
                (*EP2, "--smartmoe-same-start", "--init-method-std", "0.03", "--train-iters", "1"),
                ("megatron", "ours"),
            ),
            Case("saved-whole", MOVING, (*EP2, *RESHARDABLE, *SAVE)),
            Case("saved-same", MOVING, (*EP2, *RESHARDABLE, *LOAD)),
            # Megatron asks for states of fp8 layers, which are empty, and which SmartMoE's layer does not write
            Case("saved-foreign", "megatron", (*EP2, *RESHARDABLE, *LOAD, "--dist-ckpt-strictness", "log_all")),
            Case("foreign-megatron", "megatron", (*EP2, *RESHARDABLE, *SAVE)),
            Case("foreign-ours", "smartmoe_static", (*RESHARDABLE, "--load", "{folder}/saved-foreign", *LOAD[2:])),
            Case("saved-one", "smartmoe_static", (*RESHARDABLE, *LOAD)),
        ],
        4: [
            *plan("edp2", (*EP2, *SHARDED, *RECOMPUTE), ("ours", "moving")),
            *plan("clipped", (*EP2, *CLIPPED), ("megatron", "ours")),
            Case("bare-moving", MOVING, (*EP2, *PP2, "--moe-layer-freq", "[1,0]", "--train-iters", str(MOVE_AT), *SAVE)),
            *plan("pp2ep2", (*EP2, *PP2, *SHARDED)),
        ],
    }


# -------------------------------------------------------------------------------------------------- inside a rank


def run_case(case: Case, folder: Path) -> None:
    """Train as a user would, from weights that depend on their names alone, written to folder/<case's name>."""
    from smartmoe.hosts.megatron import pretrain_gpt, run

    words = [word for key, value in SIZES.items() for word in (f"--{key}", str(value))]
    words += [f"--{flag}" for flag in FLAGS if not (flag == "smartmoe-text" and "--mock-data" in case.words)]
    own = [word.format(folder=folder, group=case.name.split("-")[0]) for word in case.words]
    sys.argv = ["pretrain_gpt", *words, *own, "--smartmoe", case.system, "--smartmoe-run", str(folder / case.name)]
    describe = pretrain_gpt.model_config
    if case.system != LAUNCHED:
        is_start = case.name.startswith("start")
        hook = partial(note_experts, folder / f"{case.name}.{dist.get_rank()}.pt") if is_start else fill
        pretrain_gpt.model_config = partial(_with_hook, hook, describe)
    try:
        if case.system == LAUNCHED:
            if dist.get_rank() == 0:
                record.create_run(folder / case.name, case.name, to_dict(launched_config()), [])
            dist.barrier()
            run.main([str(folder / case.name)], stay=True)
            gc.collect()
            left = [one for one in gc.get_objects() if type(one).__name__ == "DistributedDataParallel"]
            assert not left or dist.get_world_size() > 1, "the model outlives its run: a shared world would run out of memory"
        else:
            assert pretrain_gpt.main() == 0
    except SystemExit as ended:
        assert not ended.code
    finally:
        pretrain_gpt.model_config = describe
        if case.system != LAUNCHED:
            run.forget()


def turn_of_whole_passes(timer, turn) -> dict:
    """LayerTimer.turn, where what is timed has backward passes: an evaluation's are nothing for the placement."""
    num_passes = Counter((layer_idx, part) for layer_idx, part, *_ in timer._marks)
    assert all(num_passes[idx, "backward"] == num for (idx, _), num in num_passes.items()), num_passes
    return turn(timer)


def launched_config():
    """The smallest run of figure 8's kind: GShard's capacity, biases, ZeRO-1; in bfloat16 where one rank has all experts."""
    ranks = dist.get_world_size()
    sizes = {"num_layers": 2, "hidden_size": 32, "ffn_size": 32, "num_heads": 2, "seq_len": 16, "num_experts": 4}
    return systems.build(
        "megatron",
        model=ModelConfig(**sizes),
        gate=GateConfig(kind="gshard", capacity=1.2),
        workload=Workload(global_batch_size=4, micro_batch_size=1, iterations=ITERATIONS, lr=1e-2,
                          dtype="bfloat16" if ranks == 1 else "float32"),
        cluster=ClusterSpec(device="cuda", ranks_per_node=ranks),
    )


def _with_hook(hook, describe, *args):
    config = describe(*args)
    config.pre_wrap_hooks.append(hook)
    return config


def note_experts(file: Path, chunks):
    """Write the rank's experts as they are, [in, out] each, by layer and number."""
    experts = []
    for layer in (layer for chunk in chunks for layer in chunk.decoder.layers):
        if hasattr(layer.mlp, "moe"):
            experts += [weights[:2] for weights in zip(*layer.mlp.moe.experts.parameters(), strict=True)]
        else:
            experts += [(e.linear_fc1.weight.t(), e.linear_fc2.weight.t()) for e in layer.mlp.experts.local_experts]
    torch.save([[weight.detach().clone() for weight in expert] for expert in experts], file)
    return chunks


@torch.no_grad()
def fill(chunks):
    """Give every matrix the values that belong to its layer and name, in Megatron's layer and in ours."""
    from megatron.core import mpu

    from smartmoe.hosts.megatron.moe import SmartMoELayer

    part = mpu.get_tensor_model_parallel_rank()
    for chunk in chunks:
        layers = list(chunk.decoder.layers)
        inside = {id(param) for layer in layers for param in layer.parameters()}
        named = [("", name, param) for name, param in chunk.named_parameters() if id(param) not in inside]
        for layer in layers:
            named += [
                (layer.layer_number, name, param) for name, param in layer.named_parameters() if "experts" not in name
            ]
            if hasattr(layer.mlp, "router"):
                fill_experts(layer, isinstance(layer.mlp, SmartMoELayer))
        for number, name, param in named:
            if param.dim() > 1:
                cut = 0 if "router" in name else part
                param.copy_(values(tuple(param.shape), number, name, cut))
    return chunks


def fill_experts(layer, is_ours: bool) -> None:
    count = layer.mlp.num_local_experts
    first = torch.distributed.get_rank(layer.mlp.ep_group) * count
    for slot in range(count):
        shapes = {"fc1": (2 * SIZES["moe-ffn-hidden-size"], SIZES["hidden-size"])}
        shapes["fc2"] = (SIZES["hidden-size"], SIZES["moe-ffn-hidden-size"])
        up, down = (values(shape, layer.layer_number, name, first + slot) for name, shape in shapes.items())
        if is_ours:
            experts = layer.mlp.moe.experts
            experts.w1_LDF[slot].copy_(up.t()), experts.w2_LFD[slot].copy_(down.t())
        else:
            expert = layer.mlp.experts.local_experts[slot]
            expert.linear_fc1.weight.copy_(up), expert.linear_fc2.weight.copy_(down)


def values(shape: tuple[int, ...], *key) -> torch.Tensor:
    """Experts and routers that matter: with the usual 0.02 the loss hardly notices them."""
    from smartmoe.ops.hashing import make_key

    generator = torch.Generator().manual_seed(make_key(*key))
    return torch.empty(shape).normal_(0.0, 0.2, generator=generator)


def rank_main(rank: int, size: int, cases: list[Case], folder: Path) -> None:
    gc.freeze()  # what Megatron imports is a lot to look through in every collection
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK="0", CUDA_DEVICE_MAX_CONNECTIONS="1")
    signal.alarm(500)  # a rank that waits for one that is gone ends, too
    log = os.open(folder / f"log.{size}.{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1), os.dup2(log, 2)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store{size}", rank=rank, world_size=size)
        for case in cases:
            start = time.perf_counter()
            run_case(case, folder)
            groups = dist.distributed_c10d._world.pg_map
            assert len(groups) == 1, f"{len(groups) - 1} process groups outlive their run, each with a thread that wakes often"
            print(f"## {case.name} {time.perf_counter() - start:.1f} s", flush=True)
        dist.barrier()
    except BaseException:
        (folder / f"error{size}.{rank}").write_text(f"rank {rank} of {size}, {case}:\n{traceback.format_exc()}")
        os._exit(1)
    os._exit(0)


def main() -> None:
    folder = Path(sys.argv[1])
    os.chdir(ROOT)
    (folder / MOVING).write_text(MOVING_TEXT)
    for mode, file in COPIES.items():
        (folder / file).write_text(COPIES_TEXT.format(mode=mode))
    import tests.hosts.megatron_cpu as cpu

    cpu.install()
    import smartmoe.hosts.megatron.pretrain_gpt  # noqa: F401

    cpu.allow_norms_with_sequence_parallel()
    timing.LayerTimer.turn = partialmethod(turn_of_whole_passes, timing.LayerTimer.turn)
    replicas.copy_cost = lambda config: 0  # with so few tokens "exact" would find that no copy pays
    chosen = set(sys.argv[2:])
    for size, cases in worlds().items():
        cases = [
            dataclasses.replace(
                case, system=str(folder / case.system) if case.system.endswith(".toml") else case.system
            )
            for case in cases
            if not chosen or case.name.split("-")[0] in chosen
        ]
        if not cases:
            continue
        pids = []
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                rank_main(rank, size, cases, folder)
            pids.append(pid)
        failed = False
        while pids:
            pid, status = os.wait()
            pids.remove(pid)
            if status and not failed:
                failed = True
                for other in pids:
                    os.kill(other, 9)
        if failed:
            break


if __name__ == "__main__":
    main()
