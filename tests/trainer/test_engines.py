"""Which ranks hold an engine, and which devices it sees."""

from types import SimpleNamespace

import pytest
import torch

from rollout.engine import Decoding, EngineError, Request
from rollout.engines import visible_devices
from rollout.errors import InputError
from rollout.ranks import Ranks
from rollout.vllm.group import GroupMember
from rollout.vllm.settings import VllmSettings
from trainer import engines
from trainer.setup import wait_for_engines


def config(tensor_parallel: int) -> SimpleNamespace:
    return SimpleNamespace(engine=SimpleNamespace(tensor_parallel=tensor_parallel))


def test_the_first_rank_of_each_group_holds_its_engine(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert list(engines.engine_hosts(config(1), Ranks(3, 16))) == list(range(16))
    assert list(engines.engine_hosts(config(4), Ranks(3, 16))) == [0, 4, 8, 12]


def test_groups_do_not_reach_over_hosts(monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"^engine\.tensor_parallel: 4 does not divide the 2 ranks of this host; set it to"):
        engines.engine_hosts(config(4), Ranks(0, 8))


def test_an_engine_sees_its_groups_devices(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert visible_devices(torch.device("cuda", 4), 2) == "4,5"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,GPU-a,GPU-b")
    assert visible_devices(torch.device("cuda", 2), 2) == "GPU-a,GPU-b"
    assert visible_devices(torch.device("cpu"), 2) is None


def test_an_engine_is_not_given_devices_that_are_not_there(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert visible_devices(torch.device("cuda", 0), 1) == "0"
    with pytest.raises(
        InputError, match=r"^tensor parallel 2: .* begin at number 0, and this process sees 1 \(CUDA_VISIBLE_DEVICES=0\)"
    ):
        visible_devices(torch.device("cuda", 0), 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert visible_devices(torch.device("cuda", 2), 2) == "2,3"
    with pytest.raises(InputError, match="begin at number 3, and this process sees 4"):
        visible_devices(torch.device("cuda", 3), 2)


def test_memory_that_cannot_be_shared_is_said_on_every_rank():
    engines.check_allocator({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"})
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        with pytest.raises(InputError, match=f"^environment: {name} sets expandable_segments:True"):
            engines.check_allocator({name: "max_split_size_mb:64,expandable_segments:True"})


@pytest.mark.parametrize(("cache", "told"), [(None, {"gpu_memory_utilization": 0.6}), (7, {"kv_cache_memory_bytes": 7})])
def test_a_vllm_with_a_cache_of_its_own_does_not_ask_for_most_of_a_gpu(cache, told):
    """vLLM refuses to start where its fraction of the GPU is not free, also where its cache's size is given."""
    arguments = VllmSettings("m", "bfloat16", 64, kv_cache_bytes=cache, gpu_memory_fraction=0.6).memory_arguments()
    assert arguments.items() >= told.items()
    assert arguments["gpu_memory_utilization"] <= (0.6 if cache is None else 0.05)


def test_a_vllm_that_shares_a_gpu_is_up_before_anything_is_loaded():
    calls: list = []
    wait_for_engines(Loaded(calls), Ranks())
    assert calls == [("ready",)]

    class Lost(Loaded):
        def ready(self):
            raise EngineError("no room")

    wait_for_engines(Lost(calls), Ranks())  # the first push starts it anew


class Loaded:
    """An engine that notes what is asked of it."""

    version, pid = None, 17

    def __init__(self, calls: list) -> None:
        self.calls = calls

    def load(self, version, source):
        self.version = version
        self.calls.append(("load", version, list(source)))

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *arguments))


def test_a_rank_that_lends_its_device_takes_part_in_pushes_and_samples_nothing():
    calls: list = []
    member = GroupMember(None, lambda: calls.append("met"))
    source = iter([("a", torch.zeros(1)), ("b", torch.zeros(1))])
    member.ready()
    member.load(5, source)
    assert next(source, None) is None, "the other ranks wait for it in each tensor"
    assert member.version == 5
    with pytest.raises(EngineError, match="none to ask"):
        member.submit([Request(torch.zeros(1).numpy())], Decoding(1))
    member.sleep()
    assert member.version is None, "as its host's, so that all push again"
    member.restart()
    member.close()
    assert calls == ["met"]


def test_its_first_rank_asks_the_engine_and_sleeps_before_the_others_go_on():
    calls: list = []
    member = GroupMember(Loaded(calls), lambda: calls.append("met"))
    member.load(3, iter([]))
    assert member.version == 3
    assert member.pid == 17
    member.sleep()
    member.restart()
    assert calls == [("load", 3, []), ("sleep",), "met", ("restart",)]
