"""Which data the launcher gives to which runs, and what it does without it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from launch import give_data, without_what_lacks

from smartmoe.config import ModelConfig, RunConfig, Workload
from smartmoe.images import FILES
from smartmoe.swin_sizes import SwinConfig

MODEL = ModelConfig(swin=SwinConfig())


def test_each_run_of_the_launcher_gets_the_data_of_its_kind(tmp_path):
    text, folder = str(tmp_path / "text.txt"), str(tmp_path / "images")
    Path(text).touch()
    for name in FILES:
        Path(folder).mkdir(exist_ok=True)
        Path(folder, name).touch()
    runs = [SimpleNamespace(config=RunConfig(model=model)) for model in (MODEL, ModelConfig())]
    give_data(runs, [text, folder])
    assert [run.config.workload.data for run in runs] == [(folder,), (text,)]
    give_data(runs, ["synthetic"])
    assert [run.config.workload.data for run in runs] == [("synthetic",), (text,)]
    for run, name in zip(runs, (text, folder), strict=True):
        with pytest.raises(ValueError, match="--data .*: none of these runs trains on it: those of figure 9 take a folder"):
            give_data([run], [name])
    with pytest.raises(ValueError, match="imagse: there is no such file or folder, and no .*imagse.bin"):
        give_data(runs, [text, str(tmp_path / "imagse")])
    there, absent = [SimpleNamespace(entry="train", key=key, config=run.config) for key, run in enumerate(runs)]
    absent.config = RunConfig(model=MODEL, workload=Workload(data=(str(tmp_path / "nowhere"),)))
    kept, skipped = without_what_lacks([there, absent], None)
    assert kept == [there] and list(skipped.values()) == [[absent]] and "apt-get install" in next(iter(skipped))
