"""Training systems beside smartmoe.train: SmartMoE's layer inside other programs, and other programs' own layers on our runs.
Layer 6: entries, each in a folder of its own. This module never imports torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from smartmoe import systems
from smartmoe.config import RunConfig
from smartmoe.hosts.deepspeed import limits as deepspeed_limits
from smartmoe.hosts.megatron import limits as megatron_limits


@dataclass(frozen=True)
class Host:
    """A program that trains the run of a run directory: torchrun -m `module` RUN_DIR. It needs `package`, which `install`
    brings; `problems(config)` lists why it cannot do a run. `import_name`: of the package, where it is another one."""

    module: str
    package: str
    install: str
    problems: Callable[[RunConfig], list[str]]
    import_name: str = ""

    @property
    def lacking(self) -> str:
        """What this Python must be given first; empty when it has the package."""
        if importlib.util.find_spec(self.import_name or self.package) is not None:
            return ""
        return f"the package {self.package} is not installed: {self.install}"


HOSTS = {
    "deepspeed": Host(
        "smartmoe.hosts.deepspeed.pretrain_gpt",
        "deepspeed",
        'pip install --no-build-isolation "deepspeed>=0.19.8,<0.20"',
        deepspeed_limits.problems,
    ),
    "megatron": Host(
        "smartmoe.hosts.megatron.run",
        "megatron-core",
        'pip install --no-build-isolation ".[megatron]" (Python >= 3.12)',
        megatron_limits.problems,
        import_name="megatron",
    ),
}


def host_of(system: str) -> Host | None:
    """Who trains runs of `system`; None is smartmoe.train, which takes those of any other name, too."""
    known = systems.SYSTEMS.get(system)
    return HOSTS[known.host] if known and known.host else None


def check(config: RunConfig, where: str) -> RunConfig:
    """Return `config` unchanged, or raise ValueError with all that the host of its system cannot do."""
    host = host_of(config.system)
    found = host.problems(config) if host else []
    if host and config.model.swin is not None:
        found = ["it trains GPTs, model.swin makes a Swin transformer", *found]
    if found:
        raise ValueError(f'{where}: system "{config.system}" cannot do this run: ' + "; ".join(found))
    return config
