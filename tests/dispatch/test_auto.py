"""Where "auto" takes the direct exchange: GPUs of one host, linked by NVLink as far as torch can tell."""

import logging
from types import SimpleNamespace

import pytest
import torch

from smartmoe import dispatch
from smartmoe.config import LayerConfig
from smartmoe.dispatch import symmetric
from smartmoe.dispatch.basic import BasicDispatcher
from smartmoe.dispatch.direct import DirectDispatcher

SWITCHED = [[0, 18, 18], [18, 0, 18], [18, 18, 0]]
PAIRS = [[0, 4, 0], [4, 0, 0], [0, 0, 0]]


@pytest.fixture
def gpus(monkeypatch):
    """Three GPUs of this process; `reach` and `links` are their matrices, links None = torch cannot tell."""
    state = SimpleNamespace(reach=[[True] * 3] * 3, links=SWITCHED, uuids=["a", "b", "c"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(state.uuids))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda idx: SimpleNamespace(uuid=state.uuids[idx]))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: state.reach[a][b])
    monkeypatch.setattr(symmetric, "_nvlinks", lambda idx: None if state.links is None else state.links[idx])
    return state


def reason(device, uuids, over_nvlink, hosts="xxx"):
    return symmetric._reason_here(list(zip(hosts, uuids, strict=False)), device, over_nvlink)


def test_gpus_of_one_nvlink_domain_are_taken_and_others_are_not(gpus):
    assert [reason(idx, "abc", True) for idx in range(3)] == [None] * 3
    gpus.links = PAIRS
    assert reason(0, "ab", True) is None and "not over NVLink" in reason(0, "abc", True)
    assert "not over NVLink" in reason(2, "cb", True) and reason(2, "cb", False) is None
    gpus.reach = [[True, False, True]] * 3
    assert "cannot reach" in reason(0, "ab", True) and "cannot reach" in reason(0, "ab", False)
    assert "several hosts" in reason(0, "ab", True, hosts="xy")


def test_what_torch_cannot_tell_is_taken_for_nvlink_and_logged(gpus, caplog):
    with caplog.at_level(logging.INFO, logger="smartmoe.dispatch.symmetric"):
        assert reason(0, "abc", True) is None and not caplog.records
        gpus.links = None
        assert reason(0, "abc", True) is None and len(caplog.records) == 1
        # each process sees its own GPU only, as number 0
        gpus.links, gpus.uuids = [[0]], ["b"]
        assert reason(0, "ab", True) is None and len(caplog.records) == 2
    assert all("cannot tell" in record.getMessage() for record in caplog.records)


def test_gpus_are_found_by_identity_whatever_their_numbers(gpus):
    gpus.links, gpus.uuids = PAIRS, ["b", "c", "a"]  # numbers 0 and 1 are linked: b and c
    assert reason(0, "bc", True) is None and "not over NVLink" in reason(0, "ab", True)


def test_a_gpu_that_ranks_share_is_taken_on_request_only(gpus):
    assert reason(0, "aa", False) is None and "share a GPU" in reason(0, "aa", True)


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl", "cpu:gloo,cuda:gloo"])
def test_a_group_for_cuda_tensors_will_do_and_one_for_cpus_will_not(monkeypatch, backend):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(symmetric.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(symmetric, "group_size", lambda group: 2)
    monkeypatch.setattr(symmetric, "_identity", lambda device: "a")
    monkeypatch.setattr(symmetric, "_reason_here", lambda ranks, device, over_nvlink: None)
    monkeypatch.setattr(symmetric, "_gather_objects", lambda value, group: [value] * 2)
    for name, reason in ((backend, None), ("gloo", "the group's backend is gloo, none for CUDA tensors (nccl)")):
        monkeypatch.setattr(symmetric.dist, "get_backend", lambda group, name=name: name)
        assert symmetric._find_reason("group", False) == reason


def test_a_torch_without_the_detector_cannot_tell():
    assert torch.cuda.is_available() or symmetric._nvlinks(0) is None


@pytest.mark.parametrize("why", [None, "GPU 0 reaches some of the others, but not over NVLink"])
def test_auto_asks_for_nvlink_and_direct_does_not(monkeypatch, caplog, why):
    asked = []
    monkeypatch.setattr(dispatch, "why_unavailable", lambda group, over_nvlink: asked.append(over_nvlink) or why)
    dispatch._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, logger="smartmoe.dispatch"):
        built = dispatch.build_dispatcher(LayerConfig(dispatcher="auto"), None, slots_per_rank=2)
    assert isinstance(built, BasicDispatcher if why else DirectDispatcher) and asked == [True]
    assert caplog.records[-1].getMessage() == "layer.dispatcher = auto: " + (f"basic: {why}" if why else "direct")


@pytest.mark.gpu
def test_the_links_of_this_machine_are_told():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 CUDA devices")
    links = symmetric._nvlinks(0)
    assert len(links) == torch.cuda.device_count() and links[0] == 0
    assert symmetric._identity(0) != symmetric._identity(1)
