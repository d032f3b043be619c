"""What SmartMoE does around Megatron's training steps and checkpoints: placement between steps, the run directory, and
placements beside checkpoints. Megatron's loop calls its own functions by name; `Session.install` puts wrappers there.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.training import checkpointing, get_args, training

from smartmoe import record
from smartmoe.config import RunConfig, to_dict
from smartmoe.hosts.megatron.copies import Copies
from smartmoe.hosts.megatron.grads import sum_in_main_grads
from smartmoe.hosts.megatron.moe import smartmoe_layers
from smartmoe.hosts.megatron.options import HOST_ONLY
from smartmoe.hosts.megatron.states import ExpertStates, MegatronPlacement, after_loading, before_loading
from smartmoe.online import is_due
from smartmoe.placement import Placement

PLACEMENT_FILE = "smartmoe.json"


class Session:
    """One run of Megatron's loop.

    run_dir: None = write nothing; otherwise world rank 0 writes there, see logs/README.md. A run.json that is there
    (from a launcher) keeps its bars; one is made otherwise.
    """

    def __init__(self, run: RunConfig, run_dir: Path | None):
        self.run, self.run_dir = run, run_dir
        self._writer: record.RunWriter | None = None
        self._layers: list = []
        self._chunks: list = []
        self.online: MegatronPlacement | None = None
        self._copies = Copies([], None)
        self._is_started = self._is_stepping = self._is_launched = False
        self._originals: dict[str, Callable] = {}

    def install(self) -> None:
        """Wrap Megatron's functions of this process: train_step, save_checkpoint, load_checkpoint."""
        for name in ("train_step", "save_checkpoint", "load_checkpoint"):
            self._originals[name] = getattr(training, name)
            setattr(training, name, _wrapped(self._originals[name], getattr(self, "_" + name)))

    def uninstall(self) -> None:
        """Put Megatron's own functions back, for the next run of this process."""
        for name, original in self._originals.items():
            setattr(training, name, original)
        for chunk in self._chunks:
            _let_go(chunk)
        self._chunks = []

    # ------------------------------------------------------------------------------------------------------ steps

    def _start(self, model, optimizer) -> None:
        if self._is_started:
            return
        self._is_started = True
        self._chunks = list(model)
        self._layers = [layer.moe for layer in smartmoe_layers(model)]
        if self._layers and optimizer is not None:
            stage_group, ep_group = mpu.get_tensor_and_data_parallel_group(), self._layers[0].ep_group
            self.online = MegatronPlacement(
                self._layers,
                self.run.online,
                states=ExpertStates(optimizer, mpu.get_expert_data_parallel_group()),
                ep_group=ep_group,
                stage_group=stage_group if dist.get_world_size(stage_group) > 1 else None,
                node_of_rank_W=self._nodes(ep_group),
                num_micro_batches=get_num_microbatches(),
            )
            self._copies = Copies(self._layers, ep_group)
            self._copies.refresh()
            if not get_args().overlap_grad_reduce:
                sum_in_main_grads(param for layer in self._layers for param in layer.experts.parameters())

    def _nodes(self, ep_group) -> tuple[int, ...] | None:
        if ep_group is None:
            return None
        return tuple(rank // self.run.cluster.ranks_per_node for rank in dist.get_process_group_ranks(ep_group))

    def _train_step(
        self, original, forward_step, data, model, optimizer, scheduler, config, *rest, iteration=None, **kwargs
    ):
        self._start(model, optimizer)
        if not self._is_stepping:
            self._is_stepping = True
            config.finalize_model_grads_func = self._copies.return_before(config.finalize_model_grads_func)
            self._open(iteration)
        if self.online:
            self.online.forget_passes()  # an evaluation's, whose tokens do not count, are not timed
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = original(forward_step, data, model, optimizer, scheduler, config, *rest, iteration=iteration, **kwargs)
        events = self.online.after_step(iteration + 1) if self.online else []
        replica_bytes = self._copies.take_bytes()  # what `refresh` sends now is the next iteration's
        self._copies.refresh()
        torch.cuda.synchronize()
        self._write(iteration + 1, (time.perf_counter() - start) * 1e3, result, optimizer, events, replica_bytes)
        return result

    def _write(self, iteration: int, step_ms: float, result, optimizer, events: list[dict], replica_bytes: int) -> None:
        """Collective over the world, where there is a run directory."""
        if self.run_dir is None:
            return
        loss_dict, skipped, *_, grad_norm, _, _ = result
        loss = loss_dict.get("lm loss")
        loss = -math.inf if loss is None else float(loss)
        load = self.online.load_max_over_mean() if self.online else 1.0
        mine = [step_ms, loss, load, grad_norm or 0.0, replica_bytes]
        worst = torch.tensor(mine, dtype=torch.float64, device="cuda")
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        step_ms, loss, load, grad_norm, replica_bytes = worst.tolist()
        events = self._gather_events(iteration, events)
        if self._writer is None:
            return
        args = get_args()
        metric = {
            "iteration": iteration,
            "step_ms": round(step_ms, 3),
            "lm_loss": loss,
            "grad_norm": grad_norm,
            "loss_scale": float(optimizer.get_loss_scale()),
            "learning_rate": optimizer.param_groups[0]["lr"],
            "tokens_per_s": round(args.global_batch_size * args.seq_length / step_ms * 1e3, 1),
            "load_max_over_mean": round(load, 4),
            "replica_bytes": int(replica_bytes),
            "skipped": bool(skipped),
            "consumed_samples": iteration * args.global_batch_size,
        }
        self._writer.metric(metric)
        for event in events:
            self._writer.event(event)
        line = record.iteration_line(metric, num_iterations=args.train_iters, global_batch_size=args.global_batch_size)
        self._writer.log(line)

    def _gather_events(self, iteration: int, events: list[dict]) -> list[dict]:
        """On world rank 0, those of all stages, of which some may have no layer with experts. Collective over the world."""
        if not is_due(self.run.online, iteration):
            return []
        mine = events if mpu.get_expert_data_parallel_rank() == 0 and _stage_rank() == 0 else []
        parts = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, parts, dst=0)
        return [event for part in parts or [] for event in part]

    # ---------------------------------------------------------------------------------------------- run directory

    def _open(self, iteration: int) -> None:
        if self.run_dir is None or self._writer is not None or dist.get_rank() != 0:
            return
        if not (self.run_dir / "run.json").exists():
            facts = {"host": "megatron", "megatron_core": version("megatron-core"), "num_ranks": dist.get_world_size()}
            name = record.safe_run_id(self.run.system, self.run.plan.describe().replace(" ", "-"))
            provenance = record.provenance(**facts, **_device_name())
            record.create_run(self.run_dir, name, to_dict(self.run), [self._bar()], provenance=provenance)
        run = record.read_run(self.run_dir)
        self._is_launched = run["status"] != "pending" or "entry" in run.get("provenance", {})
        if not self._is_launched:
            record.set_status(self.run_dir, "running")
        self._writer = record.RunWriter(self.run_dir, keep_through=iteration or None)

    def _bar(self) -> dict[str, str]:
        """Where plotting draws the loss: over those of other runs of the same model on as many ranks."""
        model = self.run.model
        panel = f"Megatron-LM's loop, L{model.num_layers}-H{model.hidden_size}, {model.num_experts} experts"
        return {"figure": "losses", "panel": panel, "group": f"{dist.get_world_size()} ranks", "series": self.run.system}

    def finish(self, status: str = "ok", message: str = "") -> None:
        """Close the run directory, and say how the run ended unless a launcher does."""
        if self._writer is not None:
            self._writer.close()
            if not self._is_launched:
                record.set_status(self.run_dir, status, message)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _save_checkpoint(self, original, iteration, model, optimizer, *rest, **kwargs):
        """Megatron's checkpoint of experts in plain order, which any number of ranks reads, then back again."""
        self._start(model, optimizer)
        placements = [layer.placement for layer in self._layers]
        replicas = [layer.replicas for layer in self._layers]
        self._place([Placement.identity(each.num_experts, each.num_ranks) for each in placements])
        result = original(iteration, model, optimizer, *rest, **kwargs)
        self._place(placements)
        for layer, old in zip(self._layers, replicas, strict=True):
            if layer.replicas != old:  # a move forgets them
                layer.set_replicas(old)
        self._copies.refresh()
        if self.run.system != HOST_ONLY:
            self._save_placements(_checkpoint_dir(get_args().save, iteration))
        return result

    def _place(self, placements: list[Placement]) -> None:
        targets = [(layer, new) for layer, new in zip(self._layers, placements, strict=True) if layer.placement != new]
        if targets:
            self.online.move(targets)

    def _save_placements(self, folder: Path) -> None:
        """Collective over the world."""
        mine = {layer.layer_idx: layer.placement.to_dict() for layer in self._layers}
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (mine, self.online.saved_loads() if self.online else {}))
        if dist.get_rank() == 0:
            facts = {"placements": {}, "loads": {}, "config": to_dict(self.run)}
            for placements, loads in parts:
                facts["placements"] |= placements
                facts["loads"] |= loads
            record.write_json(folder / PLACEMENT_FILE, facts)

    def _load_checkpoint(self, original, model, optimizer, *rest, **kwargs):
        """Megatron's checkpoint, then each expert to where it was, on as many ranks as then."""
        args = get_args()
        has_states = optimizer is not None and not args.no_load_optim and not args.finetune
        if has_states:
            before_loading(optimizer)
        result = original(model, optimizer, *rest, **kwargs)
        if has_states:
            after_loading(optimizer)
        self._start(model, optimizer)
        file = _checkpoint_dir(args.load, result[0]) / PLACEMENT_FILE if args.load and result[0] else None
        if self.online is not None and file is not None and file.exists():
            self._restore(file, result[0])
        self._copies.refresh()
        return result

    def _restore(self, file: Path, iteration: int) -> None:
        facts = _read_placements(file)
        saved = {int(layer): Placement.from_dict(data) for layer, data in facts["placements"].items()}
        wanted = []
        for layer in self._layers:
            old = saved.get(layer.layer_idx, layer.placement)
            wanted.append(old if old.num_ranks == layer.placement.num_ranks else layer.placement)
        self._place(wanted)
        self.online.restore_loads(iteration, {int(layer): load for layer, load in facts["loads"].items()})


def _wrapped(original, replacement):
    return lambda *args, **kwargs: replacement(original, *args, **kwargs)


def _let_go(chunk: torch.nn.Module) -> None:
    """Break the circles, through autograd's graph, in which a trained chunk keeps itself and its optimizer alive: Python's
    collector does not see them, and the next run of this process would find the memory taken."""
    if hasattr(chunk, "grad_accs"):
        chunk.grad_accs.clear()
    for module in chunk.modules():
        for owner in (module, getattr(module, "token_dispatcher", None)):
            for name, value in list(vars(owner).items() if owner is not None else ()):
                if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                    setattr(owner, name, None)  # Megatron's dispatchers keep the last micro-batch's routing


def _stage_rank() -> int:
    return dist.get_rank(mpu.get_tensor_and_data_parallel_group())


def _device_name() -> dict[str, str]:
    return {"device": torch.cuda.get_device_name()} if torch.version.cuda and torch.cuda.is_available() else {}


def _checkpoint_dir(root: str, iteration: int) -> Path:
    return Path(checkpointing.get_checkpoint_name(root, iteration, return_base_dir=True))


def _read_placements(file: Path) -> dict:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
        return {"placements": dict(facts["placements"]), "loads": dict(facts["loads"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: damaged: {error!r}; remove it to resume with experts in plain order") from None
