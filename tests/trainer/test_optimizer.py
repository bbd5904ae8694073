"""AdamW as it was, its moments on the host, and in 8 bits with bf16 weights: the numbers, the memory, checkpoints, several ranks.

What it proves: offloaded moments change no bit, and no order of three streams lets a copy meet another; coded moments are AdamW's
within the bound of their table; rounding loses nothing on average; copies of the model stay equal. What it does not: speed, and
anything that only a GPU does. Of its compiled update it sees what the compiler makes for a CPU.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import optimizer_ranks
import pytest
import torch
from optimizer_ranks import EIGHT_BIT, RANKS, STAGE, coded_actor, coded_lm, updated, whole_moments
from safetensors.torch import load_file
from tiny_policy import batches, build_actor, stage, whole_gradients, whole_weights
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rollout.errors import InputError
from rollout.ranks import Ranks
from trainer import adamw8bit
from trainer.adamw8bit import AdamW8bit, block_of, decode, encode, rounded, table, tables, update_coded, update_plain
from trainer.adamw_offloaded import OffloadedAdamW
from trainer.checkpoint import Checkpoints, RunState
from trainer.checkpoint_folder import complete_checkpoint
from trainer.checkpoint_weights import CheckpointWeights
from trainer.config import CheckpointConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, RunConfig
from trainer.export import export
from trainer.host_memory import HostMemory
from trainer.optimizer import build_optimizer
from trainer.policy import PolicyWeights
from trainer.setup import build_actor as build_actor_of_run

SETTINGS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SMALL = stage(ObjectiveConfig(), mini=1, micro=2, weight_decay=0.1)
OFFLOADED = OptimizerConfig(offload=True)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> tuple[list[dict], Path]:
    """(what `optimizer_ranks` found on each of two ranks, the run folder with the checkpoint they wrote)."""
    folder = tmp_path_factory.mktemp("ranks")
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, optimizer_ranks.__file__, str(folder / "meet"), str(folder)]
    processes = [subprocess.Popen(command, env=environment | {"RANK": str(rank)}, cwd=root) for rank in range(RANKS)]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0] * RANKS
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)], folder / "run"


def checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder, Ranks(), CheckpointConfig(keep=1), lambda _: None)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    assert one.keys() == other.keys()
    return all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


def small_actor(mesh, optimizer=None):
    actor = build_actor(mesh, SMALL)
    if optimizer is not None:
        actor.optimizer = optimizer(actor.policy)
    return actor


def train(actor, steps: int):
    """The second update of a run has a gradient that is not finite, and is skipped."""
    for _ in range(steps):
        [scored] = actor.score(batches(SMALL), SMALL)
        if actor.updates == 1:
            good = scored.micro[0].old_logprob_R
            scored.micro[0].old_logprob_R = torch.full_like(good, math.nan)
            assert actor.update(scored, SMALL).skipped
            scored.micro[0].old_logprob_R = good
        assert not actor.update(scored, SMALL).skipped
    return whole_weights(actor.policy)


def test_by_default_it_is_torchs_adamw(mesh):
    """Its moments, which exist from the start, change nothing."""

    def plain(policy):
        settings = {"lr": SMALL.actor.lr, "betas": SMALL.actor.betas, "eps": 1e-8, "weight_decay": 0.1}
        return torch.optim.AdamW(policy.parameters(), **settings, foreach=False)

    assert same(train(small_actor(mesh), 3), train(small_actor(mesh, plain), 3))


def test_offloaded_moments_change_no_bit(mesh, tmp_path):
    """Over three updates and a skipped one, the third after a checkpoint was read anew, by an optimizer of either kind."""
    offloaded = lambda policy: build_optimizer(policy, SMALL.actor, OFFLOADED)  # noqa: E731
    expected = train(small_actor(mesh), 3)
    assert same(train(small_actor(mesh, offloaded), 3), expected)
    writers = {"on the device": None, "offloaded": offloaded}
    for name, writer in writers.items():
        actor = small_actor(mesh, writer)
        train(actor, 2)
        checkpoints(tmp_path / name).save(actor, RunState(step=2), wait=True)
        for reader in writers.values():
            again = small_actor(mesh, reader)
            assert checkpoints(tmp_path / name).resume(again).step == 2
            assert again.updates == 2
            assert same(train(again, 1), expected)


class Clocks(TorchDispatchMode):
    """Stands in for torch.cuda where the offloaded step looks for streams, and finds accesses to one storage by two streams that
    no event orders: vector clocks. A new tensor counts as written where it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.now: dict[str, dict[str, int]] = {"compute": {}, "host": {}}
        self.current = "compute"
        self.accesses: dict[int, list[tuple[str, int, bool]]] = {}
        self.kept: list[torch.Tensor] = []
        self.races: list[str] = []
        self.streams_used: set[str] = set()
        self.ahead = 0
        """Updates that ran while what the next one needs was on its way, not waited for."""

    def Stream(self):
        name = f"side {len(self.now)}"
        self.now[name] = {}
        return ClockedStream(self, name)

    def current_stream(self):
        return ClockedStream(self, self.current)

    @contextlib.contextmanager
    def stream(self, stream) -> Iterator[None]:
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    def synchronize(self) -> None:
        for name in list(self.now):
            self.join("host", self.now[name])

    def join(self, name: str, other: dict[str, int]) -> None:
        mine = self.now[name]
        for stream, time in other.items():
            mine[stream] = max(mine.get(stream, 0), time)

    def access(self, tensor: torch.Tensor, stream: str, *, writes: bool, what: str) -> None:
        clock = self.now[stream]
        if stream != "host":
            self.join(stream, self.now["host"])  # the host starts what a stream does
        clock[stream] = clock.get(stream, 0) + 1
        before = self.accesses.setdefault(tensor.untyped_storage()._cdata, [])
        for other, time, wrote in before:
            if (writes or wrote) and clock.get(other, 0) < time:
                self.races.append(f"{what} on {stream} meets {other}")
        before.append((stream, clock[stream], writes))
        self.streams_used.add(stream)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func._schema.name == "aten::addcdiv_":
            self.ahead += self.now["compute"].get("side 2", 0) < self.now["side 2"]["side 2"]
        if not func._schema.is_mutable and func._schema.name not in ("aten::empty", "aten::empty.memory_format"):
            written = []
        else:
            written = [result] if func._schema.name.startswith("aten::empty") else [args[0]]
        if func.is_view or func._schema.name in ("aten::_local_scalar_dense",):
            return result
        self.kept += [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]  # no storage's key is used again
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor) and not any(tensor is each for each in written):
                self.access(tensor, self.current, writes=False, what=func._schema.name)
        for tensor in written:
            self.access(tensor, self.current, writes=True, what=func._schema.name)
        return result


class ClockedStream:
    def __init__(self, clocks: Clocks, name: str) -> None:
        self.clocks, self.name = clocks, name

    def record_event(self) -> dict[str, int]:
        return dict(self.clocks.now[self.name])

    def wait_event(self, event: dict[str, int]) -> None:
        self.clocks.join(self.name, event)

    def wait_stream(self, other: ClockedStream) -> None:
        self.wait_event(other.record_event())


def clocked_steps(monkeypatch, steps: int = 3) -> Clocks:
    """Steps of five weights under the clocks, and then the host reads all moments, as a checkpoint does."""
    clocks = Clocks()
    monkeypatch.setattr(torch, "get_device_module", lambda _: clocks)
    parameters = [nn.Parameter(torch.randn(size)) for size in (5, 3, 7, 2, 4)]
    optimizer = OffloadedAdamW(parameters, **SETTINGS, foreach=False, fused=False)
    with clocks:
        for _ in range(steps):
            for parameter in parameters:
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
            for parameter in parameters:
                for name in ("exp_avg", "exp_avg_sq"):
                    clocks.access(optimizer.state[parameter][name], "host", writes=True, what="a checkpoint")
    return clocks


def test_no_copy_of_the_offloaded_step_meets_another(monkeypatch):
    clocks = clocked_steps(monkeypatch)
    assert clocks.streams_used == {"compute", "host", "side 2", "side 3"}
    assert not clocks.races
    assert clocks.ahead == 3 * 4  # of each step all but the last weight


@pytest.mark.parametrize("left_out", ["wait_event", "wait_stream", "synchronize"])
def test_the_clocks_find_what_is_left_out(monkeypatch, left_out):
    place = Clocks if left_out == "synchronize" else ClockedStream
    monkeypatch.setattr(place, left_out, lambda *_: None)
    assert clocked_steps(monkeypatch).races


def test_pinned_moments_lie_side_by_side(monkeypatch):
    """torch rounds a pinned allocation up to a power of two; slabs are one."""
    asked = []
    zeros = torch.zeros
    monkeypatch.setattr(
        torch, "zeros", lambda size, dtype, pin_memory: asked.append((size, pin_memory)) or zeros(size, dtype=dtype)
    )
    monkeypatch.setattr("trainer.host_memory.SLAB", 512)
    host = HostMemory(pinned=True)
    found = [host.zeros(torch.Size(shape)) for shape in ((6, 10), (50,), (40,), (200,), (3,))]
    assert asked == [(size, True) for size in (512, 512, 832, 512)]
    assert [tuple(each.shape) for each in found] == [(6, 10), (50,), (40,), (200,), (3,)]
    for number, each in enumerate(found):
        each.fill_(number)
    assert [each.unique().tolist() for each in found] == [[0], [1], [2], [3], [4]]


def test_the_tables_by_hand():
    signed, unsigned = table(True), table(False)
    for numbers in (signed, unsigned):
        assert len(set(numbers)) == 256
        assert list(numbers) == sorted(numbers)
        assert numbers[-1] == 1.0
        assert 0.0 in numbers
    assert unsigned[:4] == pytest.approx([0, 0.325e-6, 0.775e-6, 0.2125e-5])  # two middles in (0.1, 1) · 10^-6, then four
    assert unsigned[-2] == pytest.approx(1 - 0.9 / 128 / 2)
    assert [-number for number in signed[:127]] == pytest.approx(list(signed[-2:-129:-1]))
    assert min(number for number in signed if number > 0) == pytest.approx(0.55e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_a_coded_value_is_off_by_half_a_gap(signed):
    """In the decade up to 10^-i there are 2^(6-i) numbers (twice as many unsigned) in 0.9 · 10^-i: no value is off by more than
    0.9 / 128 of its block's largest, and the smaller the finer."""
    torch.manual_seed(0)
    numbers, middles = tables(torch.device("cpu"))[:2] if signed else tables(torch.device("cpu"))[2:]
    value = torch.randn(400, 64) * 10.0 ** torch.empty(400, 64).uniform_(-7, 0)
    value = value if signed else value.abs()
    codes, scale = encode(value, middles)
    off = (decode(codes, scale, numbers) - value).abs() / scale
    share = value.abs() / scale
    assert codes.dtype == torch.uint8
    assert scale.shape == (400, 1)
    for decade in range(7):
        top = 10.0**-decade
        inside = off[(share <= top) & (share > top / 10)]
        parts = 2 ** (6 - decade) * (1 if signed else 2)
        assert 0.8 * 0.45 / parts * top < inside.max() < 1.3 * 0.5 / parts * top  # at a border, half of the wider gap
    assert torch.equal(decode(*encode(torch.zeros(2, 64), middles), numbers), torch.zeros(2, 64))


def test_blocks_lie_within_rows():
    """So shards, which are rows, cut none. Vectors and odd rows stay in fp32."""
    shapes = {(3, 5120): 256, (7, 896): 128, (5, 576): 64, (1, 64): 64, (3, 96): None, (4096,): None, (2, 8, 32): 256}
    assert {shape: block_of(torch.Size(shape)) for shape in shapes} == shapes


def linear_problem(dtype: torch.dtype) -> tuple[nn.Parameter, nn.Parameter]:
    torch.manual_seed(3)
    return nn.Parameter(torch.randn(48, 256).to(dtype)), nn.Parameter(torch.randn(48).to(dtype))


def steps_of(optimizer: torch.optim.Optimizer, parameters: tuple[nn.Parameter, ...], count: int, spread: float = 30.0) -> None:
    """Noisy gradients. spread: how many times larger the last of a row is than the first."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(count):
        for parameter in parameters:
            size = torch.logspace(-math.log10(spread), 0, parameter.shape[-1])
            parameter.grad = (0.3 + torch.randn(parameter.shape, generator=generator)) * size
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("spread", "bound"), [(1, 0.025), (30, 0.05), (1000, 0.15)])
def test_coded_moments_move_weights_as_adamw_does(spread, bound):
    """A weight moves by its moments before they are coded, so the first step is AdamW's. Later they are off by half a gap of the
    table, the coarser the smaller the gradient within its block. Measured after 30 steps, of the distance moved: 1.2 %, 2.7 % and
    8.7 % at these spreads; the bounds are twice that. The vector in fp32 follows exactly."""
    one, other = linear_problem(torch.float32), linear_problem(torch.float32)
    start = [each.detach().clone() for each in one]
    exact = torch.optim.AdamW(one, **SETTINGS, foreach=False)
    coded = AdamW8bit(other, **SETTINGS)
    steps_of(exact, one, 1, spread)
    steps_of(coded, other, 1, spread)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=3e-7)
    steps_of(exact, one, 29, spread)
    steps_of(coded, other, 29, spread)
    matrix = (other[0] - one[0]).norm() / (one[0] - start[0]).norm()
    assert 1e-3 < matrix < bound
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=3e-6)


def test_a_weight_without_a_gradient_does_not_run_away():
    """A token that comes once: its row has a gradient of 1 and one of 1e-4, then none. The small one's v is 1e-8 of the block's
    largest, below the table; as 0 it would make each step lr · m / eps, thousands of lr."""
    row = nn.Parameter(torch.zeros(1, 64))
    optimizer = AdamW8bit([row], lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    row.grad = torch.zeros(1, 64)
    row.grad[0, 0], row.grad[0, 1] = 1.0, 1e-4
    optimizer.step()
    assert row.detach()[0, :3].tolist() == pytest.approx([-1, -1, 0], rel=1e-3)
    moved = row.detach().clone()
    row.grad = torch.zeros(1, 64)
    optimizer.step()
    assert (row - moved).abs().max() <= 1.0
    assert optimizer.state[row]["exp_avg_sq"].min() >= 1


def test_rounding_is_right_on_average():
    """x between two neighbours in bf16, 2^-7 apart: the mean of n roundings has a deviation of at most 2^-7 / 2 / sqrt(n); five
    of them are allowed."""
    count = 1 << 16
    generator = torch.Generator().manual_seed(0)
    for x in (1.001, -1.003, 1.0 + 2**-8, 1.9999):
        value = torch.full((count,), x)
        noise = torch.randint(1 << 16, (count,), generator=generator, dtype=torch.int32)
        stored = rounded(value, noise)
        assert stored.dtype == torch.bfloat16
        lower = math.floor(x * 128) / 128
        assert set(stored.tolist()) == {lower, lower + 1 / 128}
        assert abs(stored.double().mean().item() - value[0].double().item()) < 5 * 2**-8 / math.sqrt(count)
    exact = torch.randn(1000).bfloat16()
    assert torch.equal(rounded(exact.float(), torch.full((1000,), 0xFFFF, dtype=torch.int32)), exact)
    assert torch.equal(rounded(torch.zeros(3), torch.full((3,), 0xFFFF, dtype=torch.int32)), torch.zeros(3).bfloat16())


def test_small_steps_of_bf16_weights_add_up():
    """200 steps of 1e-4 from 1, where bf16's neighbours are 2^-8 below: to the nearest nothing moves. A draw deviates by at most
    2^-8 / 2, so the mean over 4096 weights by 2^-9 · sqrt(200 / 4096) = 4.3e-4; three of them are allowed."""
    weights = nn.Parameter(torch.ones(16, 256, dtype=torch.bfloat16))
    optimizer = AdamW8bit([weights], lr=1e-4, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for _ in range(200):
        weights.grad = torch.ones_like(weights)
        optimizer.step()
    assert (weights.double().mean() - 1).item() == pytest.approx(-0.02, abs=1.3e-3)
    # Of 200 draws with a chance of 1 in 39 no weight moves in 25; with the same number each time, some would in all.
    assert weights.min() > 1 - 25 / 256
    assert torch.equal((torch.ones(()) - 1e-4).bfloat16(), torch.ones((), dtype=torch.bfloat16))


def test_pieces_change_nothing(monkeypatch):
    results = []
    for piece in (1 << 20, 1024):
        parameters = linear_problem(torch.float32)
        optimizer = AdamW8bit(parameters, **SETTINGS)
        optimizer.piece = piece
        steps_of(optimizer, parameters, 3)
        results.append([each.detach().clone() for each in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_compiled_update():
    """What a GPU runs, as compiled for a CPU: the same codes as the plain one, one compilation for all numbers of rows, and in
    memory what the planner says."""
    sizes = ((40, 256), (77, 512), (300, 256))
    pairs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        parameters = tuple(nn.Parameter(torch.randn(size).bfloat16()) for size in (*sizes, (1000,), (64,)))
        optimizer = AdamW8bit(parameters, **SETTINGS)
        for parameter in parameters:
            parameter.grad_dtype = None
        if compiled:
            optimizer.update_coded, optimizer.update_plain = torch.compile(update_coded), torch.compile(update_plain)
            torch._dynamo.reset()
        _, codes = run_and_get_code(lambda p=parameters, o=optimizer: steps_of(o, p, 2))
        pairs.append([(parameter, optimizer.state[parameter]) for parameter in parameters])
    assert len({code for code in codes if "cpp_fused" in code}) == 2  # of matrices, of vectors
    held = [
        line for line in codes[0].splitlines() if "= empty_strided_cpu((s" in line and ", 256), (256, 1), torch.float32" in line
    ]
    assert 1 <= len(held) <= adamw8bit.WORKSPACE // 4
    for (plain, plain_state), (other, other_state) in zip(*pairs, strict=True):
        assert (plain != other).float().mean() < 1e-3  # a last bit of fp32 decides a few roundings
        for name, value in plain_state.items():
            assert (value != other_state[name]).float().mean() < 1e-3, name


def test_bytes_of_moments():
    """Two bytes a value, and two scales of four for each block: by the formula of `trainer.planner.cost.state_bytes` where 256
    divides a row."""
    matrix, vector = nn.Parameter(torch.zeros(30, 512)), nn.Parameter(torch.zeros(100))
    optimizer = AdamW8bit([matrix, vector], **SETTINGS)
    held = lambda parameter: sum(each.nbytes for name, each in optimizer.state[parameter].items() if name != "step")  # noqa: E731
    assert held(matrix) == (2 + 8 / 256) * 30 * 512
    assert held(vector) == 8 * 100


def test_the_norm_of_bf16_gradients_is_fp32s(mesh):
    """Summed in bf16 it would have three digits, and the clip's bound with it."""
    actor = coded_actor(mesh, torch.bfloat16, OptimizerConfig(kind="adamw8bit", gradients="bfloat16"))
    config = stage(ObjectiveConfig(), mini=1, micro=4)
    [scored] = actor.score(batches(config), config)
    actor._gradient_pass(scored, config, 0.0, lambda *_: None)
    gradients = whole_gradients(actor.policy)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.bfloat16}
    expected = torch.cat([gradient.double().flatten() for gradient in gradients.values()]).norm().item()
    actor.optimizer.zero_grad()
    found = actor.update(scored, config).grad_norm
    assert found == pytest.approx(expected, rel=1e-5)
    assert abs(torch.tensor(found).bfloat16().item() - expected) > 1e-5 * expected, "bf16 does not hold it"


def test_gradients_of_bf16_weights_are_added_in_fp32(mesh):
    """Each micro-batch's is rounded to bf16 once, as FSDP2 keeps it; the sums are exact to fp32."""
    sums, apart = {}, {}
    for kept in ("float32", "bfloat16"):
        actor = coded_actor(mesh, torch.bfloat16, OptimizerConfig(kind="adamw8bit", gradients=kept))
        config = stage(ObjectiveConfig(), mini=1, micro=4)
        [scored] = actor.score(batches(config), config)
        assert len(scored.micro) == 4
        actor._gradient_pass(scored, config, 0.0, lambda *_: None)
        sums[kept] = whole_gradients(actor.policy)
        actor.optimizer.zero_grad()
        apart[kept] = []
        micro = scored.micro
        for each in micro:
            scored.micro = [each]
            actor._gradient_pass(scored, config, 0.0, lambda *_: None)
            apart[kept].append(whole_gradients(actor.policy))
            actor.optimizer.zero_grad()
    for name, total in sums["float32"].items():
        parts = [part[name] for part in apart["float32"]]
        assert {part.dtype for part in parts} == {total.dtype} == {torch.float32}
        assert all(torch.equal(part, part.bfloat16().float()) for part in parts)
        assert torch.equal(total, parts[0] + parts[1] + parts[2] + parts[3])
        assert sums["bfloat16"][name].dtype == torch.bfloat16
        torch.testing.assert_close(
            sums["bfloat16"][name].float(), total, rtol=0, atol=3 * 2**-9 * max(p.abs().max() for p in parts) * 4
        )


def test_bf16_weights_are_pushed_saved_resumed_and_exported(mesh, tmp_path):
    """Bit for bit, and a resumed run rounds as it would have."""
    actor = updated(coded_actor(mesh, torch.bfloat16), 2)
    assert {meta.dtype for meta in PolicyWeights(actor.policy).metadata()} == {torch.bfloat16}
    weights = whole_weights(actor.policy)
    assert any(not torch.equal(weights[name], weight.bfloat16()) for name, weight in coded_lm().named_parameters())
    checkpoints(tmp_path / "run").save(actor, RunState(step=2), wait=True)
    again = coded_actor(mesh, torch.bfloat16)
    checkpoints(tmp_path / "run").resume(again)
    assert same(whole_weights(again.policy), weights)
    torch.manual_seed(99)
    assert same(whole_weights(updated(again).policy), whole_weights(updated(actor).policy))

    folder = complete_checkpoint(tmp_path / "run")
    base = tmp_path / "base"
    coded_lm().bfloat16().save_pretrained(base)
    export(CheckpointWeights(folder, tied=False), base, tmp_path / "out", "base")
    assert same(load_file(tmp_path / "out" / "model.safetensors"), weights)


def test_a_checkpoint_of_another_kind_is_refused(mesh, tmp_path):
    checkpoints(tmp_path).save(coded_actor(mesh, torch.float32), RunState(step=1), wait=True)
    with pytest.raises(
        InputError, match=r"exp_avg_scale is not there|exp_avg is torch\.uint8, and this run's is torch\.float32: set"
    ):
        checkpoints(tmp_path).resume(coded_actor(mesh, torch.float32, OptimizerConfig()))
    with pytest.raises(
        InputError, match=r"model\.\S+ is torch\.float32, and this run's is torch\.bfloat16: set model\.weights and"
    ):
        checkpoints(tmp_path).resume(coded_actor(mesh, torch.bfloat16))


def test_two_ranks_code_as_one(several, mesh):
    """Blocks lie within rows, so shards have the same ones: last bits of gradients differ, and codes beside a middle."""
    found, _ = several
    one = updated(coded_actor(mesh, torch.float32), 2)
    start = dict(coded_lm().named_parameters())
    for rank in range(RANKS):
        for name, weight in whole_weights(one.policy).items():
            off = (found[rank]["fp32"][name] - weight).norm() / (weight - start[name]).norm()
            assert off < 1e-3, name
    for name, state in whole_moments(one).items():
        there = found[0]["moments"][name]
        assert there.keys() == state.keys()
        if "exp_avg_scale" in state:
            assert (there["exp_avg"] != state["exp_avg"]).float().mean() < 0.01, name


def test_copies_of_the_model_round_alike(several):
    """HSDP, two copies of one shard each: other random numbers on each and they would drift apart."""
    found, _ = several
    assert same(found[0]["copy"], found[1]["copy"])
    started = {f"causal_lm.{name}": weight.detach().bfloat16() for name, weight in coded_lm().named_parameters()}
    assert not same(found[0]["copy"], started)


def test_two_ranks_resume_and_one_reads_what_they_wrote(several, mesh):
    found, run = several
    assert same(found[0]["resumed"], found[0]["went on"])
    actor = coded_actor(mesh, torch.bfloat16)
    checkpoints(run).resume(actor)
    assert same(whole_weights(actor.policy), found[0]["saved"]["weights"])
    for name, state in whole_moments(actor).items():
        assert same(state, found[0]["saved"]["moments"][name])


def test_a_run_gets_the_optimizer_it_names(mesh, tmp_path):
    coded_lm().bfloat16().save_pretrained(tmp_path / "model")
    model = ModelConfig(path=tmp_path / "model", weights="bfloat16")
    config = RunConfig(run=tmp_path, seed=7, model=model, optimizer=EIGHT_BIT, stages=(STAGE,))
    actor = build_actor_of_run(config, Ranks(), mesh, torch.device("cpu"))
    assert (type(actor.optimizer), actor.optimizer._seed) == (AdamW8bit, 7)
    assert {parameter.dtype for parameter in actor.policy.parameters()} == {torch.bfloat16}
    model = model.model_copy(update={"weights": "float32"})
    config = config.model_copy(update={"model": model, "optimizer": OFFLOADED})
    assert type(build_actor_of_run(config, Ranks(), mesh, torch.device("cpu")).optimizer) is OffloadedAdamW
    config = config.model_copy(update={"optimizer": OptimizerConfig()})
    assert type(build_actor_of_run(config, Ranks(), mesh, torch.device("cpu")).optimizer) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("model", "optimizer", "message"),
    [
        ({}, {"kind": "adamw8bit", "offload": True}, r"offload is for kind adamw; the moments of adamw8bit are small"),
        ({"weights": "bfloat16"}, {}, r"model\.weights bfloat16 needs optimizer\.kind: adamw8bit"),
        ({}, {"kind": "adamw8bit", "gradients": "bfloat16"}, r"optimizer\.gradients bfloat16 needs model\.weights: bfloat16"),
    ],
)
def test_what_cannot_be_combined(model, optimizer, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(run=Path("run"), model={"path": "m"} | model, optimizer=optimizer, stages=(STAGE,))
    assert RunConfig(
        run=Path("run"),
        model=ModelConfig(path=Path("m"), weights="bfloat16"),
        optimizer=EIGHT_BIT,
        stages=(STAGE,),
    )
