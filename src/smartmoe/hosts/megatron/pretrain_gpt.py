"""Train a GPT with Megatron-LM's loop and arguments, and SmartMoE's layer:

    torchrun --nproc-per-node N -m smartmoe.hosts.megatron.pretrain_gpt MEGATRON-ARGUMENTS --smartmoe SYSTEM --smartmoe-run DIR

All arguments of Megatron's own pretrain_gpt.py keep their meaning; --help lists them, SmartMoE's last.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import partial

from smartmoe.hosts import HOSTS

if missing := HOSTS["megatron"].lacking:
    raise ModuleNotFoundError(missing)

import megatron.core.datasets.utils
import torch
import torch.nn.functional as F
from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.models.gpt import default_layer_spec
from megatron.training.utils import is_first_or_last_pipeline_stage

from smartmoe.config import RunConfig
from smartmoe.hosts.megatron.data import datasets
from smartmoe.hosts.megatron.moe import with_smartmoe
from smartmoe.hosts.megatron.options import HOST_ONLY, add_arguments, run_config
from smartmoe.hosts.megatron.session import Session
from smartmoe.hosts.megatron.start import leave_out_idle_reduction, start_as_smartmoe


def model_config(args, run: RunConfig):
    """Megatron's description of the model, with SmartMoE's layer unless `run` is of Megatron's own."""
    config = gpt_config_from_args(args)
    if args.openai_gelu:  # megatron-core 0.19 reads this argument and forgets it
        config.transformer.activation_func = partial(F.gelu, approximate="tanh")
        config.transformer.bias_activation_fusion = False
    if run.system == HOST_ONLY:
        config.pre_wrap_hooks.append(leave_out_idle_reduction)
    if run.system == HOST_ONLY and args.smartmoe_same_start:
        config.pre_wrap_hooks.append(partial(start_as_smartmoe, run, config.transformer))
    if run.system != HOST_ONLY:
        config.transformer_layer_spec = with_smartmoe(config.transformer_layer_spec or default_layer_spec, run)
    return config


def forward_step(data_iterator, model):
    """One micro-batch through this stage: (output, function of the output that gives Megatron's loss)."""
    batch = {}
    if is_first_or_last_pipeline_stage(getattr(model, "vp_stage", None)) and data_iterator is not None:
        batch = {name: value.cuda(non_blocking=True) for name, value in next(data_iterator).items()}
    tokens, position_ids, labels = (batch.get(name) for name in ("tokens", "position_ids", "labels"))
    output = model(tokens, position_ids, None, labels=labels)
    return output, partial(_loss, batch.get("loss_mask"))


def _loss(loss_mask: torch.Tensor, output: torch.Tensor):
    loss_mask = loss_mask.view(-1).float()
    loss = (output.view(-1).float() * loss_mask).sum()
    num_tokens = loss_mask.sum().to(torch.int)
    report = torch.stack([loss.detach(), num_tokens.to(loss.dtype)])
    return loss, num_tokens, {"lm loss": report}


def keep_built_helpers() -> None:
    """Stop Megatron from compiling its dataset helpers where its wheel brought them built, and no makefile."""
    if importlib.util.find_spec("megatron.core.datasets.helpers_cpp") is not None:
        megatron.core.datasets.utils.compile_helpers = lambda: None


def parse():
    """Megatron's validated arguments, from sys.argv, with SmartMoE's."""
    keep_built_helpers()
    return parse_and_validate_args(extra_args_provider=add_arguments)


def train(args, run: RunConfig) -> None:
    """Megatron's training loop over what `args` say. Collective over the world that torchrun started."""
    session = Session(run, args.smartmoe_run)
    session.install()
    container = pretrain_cfg_container_from_args(args, model_config(args, run))
    try:
        pretrain(container, datasets, ModelType.encoder_or_decoder, forward_step)
    except (Exception, SystemExit) as error:  # Megatron's --exit-... arguments end the process where they apply
        good = isinstance(error, SystemExit) and not error.code
        session.finish("ok" if good else "failed", "" if good else f"{type(error).__name__}: {error}")
        raise
    finally:
        session.uninstall()
    session.finish()


def main() -> int:
    args = parse()
    try:
        run = run_config(args)
    except ValueError as error:
        print(f"smartmoe: {error}", file=sys.stderr)
        return 2
    train(args, run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
