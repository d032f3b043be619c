"""Start the benchmark: what scripts/alpa/run_deepspeed_benchmark.sh calls. Never imports torch."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

from smartmoe.hosts.deepspeed_alpa import options, report
from smartmoe.hosts.deepspeed_alpa.suites import Case, iteration_flops, parameter_count

ENTRY = "smartmoe.hosts.deepspeed_alpa.bench"
INSTALL = 'pip install --no-build-isolation ".[deepspeed]" (in the repository)'


def commands(args: argparse.Namespace, environ: dict[str, str]) -> list[list[str]]:
    """One command for each back end. Raises ValueError when nodes are missing, and says how to name them, and when nothing of
    what would run is to be captured."""
    backends = options.BACKENDS if args.backend == "both" else (args.backend,)
    if (captured := options.captured_backends(args)) and not set(captured) & set(backends):
        raise ValueError(f"--capture {args.capture} leaves --backend {args.backend} as it is: take --capture both")
    num_nodes = max(1, args.num_gpus // args.gpus_per_node)
    start = {"torchrun": _torchrun, "deepspeed": _deepspeed, "slurm": _slurm}[args.launcher]
    return [[*start(args, num_nodes, environ), *options.rank_arguments(args, backend)] for backend in backends]


def _torchrun(args, num_nodes, environ) -> list[str]:
    """Several nodes meet at the first of the hostfile: the same command is given on each of them."""
    words = _agent(args, num_nodes)
    if num_nodes == 1:
        return [*words, "--standalone", "-m", ENTRY]
    master = _hosts(_hostfile(args, num_nodes), num_nodes)[0]
    meeting = [f"--rdzv-endpoint={master}:{args.master_port}", f"--rdzv-id=alpa-{args.num_gpus}"]
    return [*words, "--rdzv-backend=c10d", *meeting, "-m", ENTRY]


def _agent(args, num_nodes) -> list[str]:
    per_node = min(args.num_gpus, args.gpus_per_node)
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={per_node}", f"--nnodes={num_nodes}"]


def _deepspeed(args, num_nodes, environ) -> list[str]:
    """DeepSpeed's own launcher, which reaches other nodes by ssh (pdsh)."""
    words = [sys.executable, "-m", "deepspeed.launcher.runner", f"--num_gpus={min(args.num_gpus, args.gpus_per_node)}"]
    if num_nodes > 1:
        hostfile = _hostfile(args, num_nodes)
        _hosts(hostfile, num_nodes)
        words += [f"--hostfile={hostfile}", f"--num_nodes={num_nodes}"]
    return [*words, f"--master_port={args.master_port}", "--no_local_rank", "--module", ENTRY]


def _slurm(args, num_nodes, environ) -> list[str]:
    """srun inside a job: one torchrun on each node."""
    if "SLURM_JOB_NODELIST" not in environ:
        raise ValueError("--launcher slurm works inside a job: salloc or sbatch first, then this command")
    hosts = _scontrol("hostnames", environ["SLURM_JOB_NODELIST"]).split()
    if len(hosts) < num_nodes:
        raise ValueError(f"{num_nodes} nodes are needed, the job has {len(hosts)}: {environ['SLURM_JOB_NODELIST']}")
    # a node's name need not be one that the network knows
    words = _scontrol("node", hosts[0]).split()
    address = next((word[len("NodeAddr=") :] for word in words if word.startswith("NodeAddr=")), hosts[0])
    step = ["srun", f"--nodes={num_nodes}", f"--ntasks={num_nodes}", "--ntasks-per-node=1"]
    meeting = [f"--master-addr={address}", f"--master-port={args.master_port}"]
    # torchrun reads its options from PET_*, too; each task knows its own node only when it runs
    return [*step, "bash", "-c", 'PET_NODE_RANK=$SLURM_NODEID exec "$@"', "-", *_agent(args, num_nodes), *meeting, "-m", ENTRY]


def _scontrol(*words: str) -> str:
    return subprocess.run(["scontrol", "show", *words], capture_output=True, text=True, check=False).stdout


def _hostfile(args, num_nodes: int) -> Path:
    return args.hostfile or Path(f"hostfile_{num_nodes}node")


def _hosts(hostfile: Path, num_nodes: int) -> list[str]:
    """The hosts of a hostfile, at least `num_nodes`. Raises ValueError when it is missing or too short."""
    if not hostfile.is_file():
        raise ValueError(f"{num_nodes} nodes need {hostfile}: write it with get_hostfiles.py, or give --hostfile FILE")
    lines = [line.split("#")[0].split() for line in hostfile.read_text(encoding="utf-8").splitlines()]
    hosts = [words[0] for words in lines if words]
    if len(hosts) < num_nodes:
        raise ValueError(f"{hostfile} has {len(hosts)} hosts, {num_nodes} nodes are needed")
    return hosts


def describe(args: argparse.Namespace, case: Case) -> str:
    """The case in three lines."""
    model = case.model
    pflops = iteration_flops(model, case.batch_size, case.group_size) / 1e15
    return (
        f"{model.name}: {parameter_count(model) / 1e9:.4f} B parameters, {model.num_layers} layers, hidden "
        f"{model.hidden_size}, {model.num_experts} experts\n"
        f"{case.num_gpus} GPUs: dp {case.num_gpus}, ep {case.ep}, expert-dp {case.expert_dp}, {case.num_micro_batches} "
        f"micro-batches of {case.micro_batch_size} sequences, {case.tokens:,} tokens an iteration, {pflops:.3g} PFLOP\n"
        f"ZeRO-{args.zero}, {args.precision}, {args.optimizer}, capacity {case.capacity} of {case.group_size} tokens; "
        f"captured in CUDA graphs: {' and '.join(options.captured_backends(args)) or 'nothing'}"
    )


def main(argv: list[str] | None = None) -> int:
    args, case = options.parse(argv)
    try:
        planned = commands(args, dict(os.environ))
    except (ValueError, OSError) as error:
        print(f"{options.PROG}: {error}", file=sys.stderr)
        return 2
    print(describe(args, case), flush=True)
    if args.dry_run:
        print("\n".join(shlex.join(command) for command in planned))
        return 0
    if importlib.util.find_spec("deepspeed") is None:
        print(f"{options.PROG}: the package deepspeed is missing: {INSTALL}", file=sys.stderr)
        return 2
    before = set(Path(args.out).glob("*.json"))
    for command in planned:
        status = subprocess.run(command, check=False).returncode
        if status:
            print(f"{options.PROG}: failed with status {status}: {shlex.join(command)}", file=sys.stderr)
            return status if status > 0 else 1
    new = sorted(set(Path(args.out).glob("*.json")) - before)
    print(report.compare([json.loads(path.read_text(encoding="utf-8")) for path in new]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
