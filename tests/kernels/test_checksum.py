"""The checksum of weights: every way to compute it gives the definition's number, and damage changes that number.

The definition is transcribed here once more, in Python's integers and straight from the head of kernels/checksum.py, and shares
no line with either implementation.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import backend
from kernels.checksum import checksum, copy_checksum

NATIVE = backend.has_native()
WAYS = [*(torch.ops.keju.cpu_capabilities() if NATIVE else []), "plain"]
"""The CPU instruction sets of this machine, and plain PyTorch."""
WORD, GOLDEN = 1 << 64, 0x9E3779B97F4A7C15
BLOCK = 4096
INF, NAN = float("inf"), float("nan")
DTYPES = [torch.uint8, torch.int8, torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.float8_e4m3fn]


@contextmanager
def computed(way: str) -> Iterator[None]:
    if way == "plain":
        with backend.use("reference"):
            yield
        return
    torch.ops.keju.set_cpu_capability(way)
    try:
        with backend.use("native"):
            yield
    finally:
        torch.ops.keju.set_cpu_capability(WAYS[-2])


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with computed(request.param):
        yield request.param


def mixed(z: int) -> int:
    z %= WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % WORD
    return z ^ (z >> 31)


def defined(data: bytes) -> int:
    """kernels/checksum.py's head, word by word."""
    padded = data + bytes(-len(data) % BLOCK)
    total = 0
    for n in range(len(padded) // BLOCK):
        digest = 0
        for i, (a, b) in enumerate(struct.iter_unpack("<II", padded[n * BLOCK : (n + 1) * BLOCK])):
            key = mixed((i + 1) * GOLDEN)
            a, b = (a + key % 2**32) % 2**32, (b + (key >> 32)) % 2**32
            digest += a * b + a + 2**32 * b
        total += mixed(digest + (n + 1) * GOLDEN)
    return mixed(total + (len(data) + 1) * GOLDEN)


def random_bytes(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def data_of(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())


SIZES = [
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    9,
    63,
    64,
    65,
    511,
    4095,
    4096,
    4097,
    4104,
    8191,
    8192,
    8193,
    3 * 4096 + 17,
    17 * 4096,
    70 * 4096 + 5,
]


@pytest.mark.parametrize("count", SIZES)
def test_it_is_the_definitions(way, count):
    data = random_bytes(count, count)
    assert checksum(data) == defined(data_of(data))


def test_known_numbers(way):
    """The number is part of what trainer and engine agree on: it must not change from version to version."""
    assert checksum(torch.empty(0)) == mixed(GOLDEN)
    assert checksum(torch.arange(1000, dtype=torch.int32)) == KNOWN


KNOWN = 10540602815742489132
"""Of 1000 little-endian int32 from 0 on."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 5), (5,), (3, 0), (33, 65), (2, 3, 4, 85)])
def test_any_dtype_and_shape(way, dtype, shape):
    elements = torch.Size(shape).numel()
    tensor = random_bytes(elements * dtype.itemsize).view(dtype).view(shape)
    assert checksum(tensor) == defined(data_of(tensor))


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4, 5, 8, 12, 32, 63])
def test_any_address(way, offset):
    memory = random_bytes(3 * BLOCK + 200)
    assert checksum(memory[offset : offset + 2 * BLOCK + 77]) == defined(data_of(memory[offset : offset + 2 * BLOCK + 77]))
    assert checksum(memory[offset : offset + 2 * BLOCK]) == defined(data_of(memory[offset : offset + 2 * BLOCK]))


@given(st.binary(max_size=9000), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_all_ways_agree(data, offset):
    memory = torch.tensor(list(bytes(offset) + data), dtype=torch.uint8)[offset:]
    expected = defined(data)
    for way in WAYS:
        with computed(way):
            assert checksum(memory) == expected, way


@pytest.mark.parametrize("mib", [1, 3, 17])
def test_large_tensors_agree(mib):
    """More than plain PyTorch takes at a time, and more than one thread's share."""
    data = random_bytes((mib << 20) + 123, mib)
    numbers = set()
    for way in WAYS:
        with computed(way):
            numbers |= {checksum(data, threads=threads) for threads in (1, 2, 3, 8)}
    assert len(numbers) == 1


# damage


@given(st.data(), st.integers(1, 20000))
@settings(max_examples=150, deadline=None)
def test_a_flipped_bit_is_always_seen(data, count):
    memory = random_bytes(count, count)
    before = checksum(memory)
    place, bit = data.draw(st.integers(0, count - 1)), data.draw(st.integers(0, 7))
    memory[place] ^= 1 << bit
    assert checksum(memory) != before


@pytest.mark.parametrize("half", [0, 1, 2, 511, 1022, 1023])
def test_a_word_at_which_a_product_alone_would_be_blind(half):
    """Where key + word is 0 in one half, the product is 0 whatever the other half is."""
    words = torch.zeros(BLOCK // 4, dtype=torch.int64)
    key = mixed((half // 2 + 1) * GOLDEN)
    words[half] = -(key >> 32 if half % 2 else key % 2**32) % 2**32
    other = half ^ 1
    seen = set()
    for value in (0, 1, 2, 2**31, 2**32 - 1, 12345):
        words[other] = value
        seen.add(checksum(torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)))
    assert len(seen) == 6


@given(st.integers(0, 2**31), st.data())
@settings(max_examples=100, deadline=None)
def test_swaps_and_shifts_are_seen(seed, data):
    memory = random_bytes(5 * BLOCK, seed)
    size = data.draw(st.sampled_from([1, 2, 4, 8, 64, BLOCK]))
    first, second = data.draw(st.lists(st.integers(0, 5 * BLOCK // size - 1), min_size=2, max_size=2, unique=True))
    swapped = memory.view(-1, size).clone()
    swapped[[first, second]] = swapped[[second, first]]
    if not torch.equal(swapped.view(-1), memory):
        assert checksum(swapped.view(-1)) != checksum(memory)
    assert checksum(memory.roll(size)) != checksum(memory)


def test_lengths_are_told_apart():
    zeros = torch.zeros(3 * BLOCK, dtype=torch.uint8)
    numbers = {checksum(zeros[:count]) for count in [*range(200), *range(BLOCK - 3, BLOCK + 4), 2 * BLOCK, 3 * BLOCK]}
    assert len(numbers) == 209


# while copying


SPECIAL = [0.0, -0.0, INF, -INF, NAN, 1.0, -1.0, 1e-45, -1e-45, 1e-40, 1.1754944e-38, 3.3895314e38, 3.4028235e38, -3.4028235e38,
           1.00390625, 1.01171875, 1.001953125, 1.0058594]  # fmt: skip
"""Among them the largest finite number, which rounds to infinity, subnormals, and ties to even below and above."""


def fp32(count: int, seed: int = 0) -> Tensor:
    """Every kind of bit pattern: numbers of all sizes, NaN of all payloads, subnormals; the special ones spread over them."""
    numbers = random_bytes(4 * count, seed).view(torch.float32).clone()
    special = torch.tensor(SPECIAL, dtype=torch.float64).to(torch.float32)
    numbers[::5] = special.repeat(1 + count // len(special))[: len(numbers[::5])]
    return numbers


@pytest.mark.parametrize("count", [0, 1, 2, 3, 15, 16, 17, 31, 33, 2047, 2048, 2049, 4096, 3 * 2048 + 5, 40 * 2048, 3 << 20])
@pytest.mark.parametrize("threads", [1, 2])
def test_rounding_to_bfloat16_is_torchs(way, count, threads):
    source = fp32(count, count)
    target, expected = torch.full((count,), 7, dtype=torch.bfloat16), torch.empty(count, dtype=torch.bfloat16)
    number = copy_checksum(source, target, threads=threads)
    expected.copy_(source)
    finite = ~source.isnan()
    assert torch.equal(target.view(torch.int16)[finite], expected.view(torch.int16)[finite])
    assert target[~finite].isnan().all()
    assert torch.equal(target.view(torch.int16), expected.view(torch.int16)), "NaN has torch's bits too"
    assert number == checksum(expected)


def test_every_bfloat16_and_both_neighbours_of_each_tie(way):
    """All 65,536 upper halves with lower halves around the tie: the whole of the rounding."""
    upper = torch.arange(1 << 16, dtype=torch.int64) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        bits = upper + lower
        source = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32).view(torch.float32)
        target, expected = torch.empty(1 << 16, dtype=torch.bfloat16), torch.empty(1 << 16, dtype=torch.bfloat16)
        copy_checksum(source, target)
        expected.copy_(source)
        assert torch.equal(target.view(torch.int16), expected.view(torch.int16)), hex(lower)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 5, 4096, 4099, 100_003, 5 << 20])
def test_a_copy_is_a_copy(way, dtype, count):
    source = random_bytes(count * dtype.itemsize if count < 1 << 20 else count, 1).view(dtype)
    target = torch.empty_like(source)
    assert copy_checksum(source, target, threads=2) == checksum(source)
    assert torch.equal(target.view(torch.uint8), source.view(torch.uint8))


@pytest.mark.parametrize("from_", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("to", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_other_conversions_are_copys(way, from_, to):
    source = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(from_)
    target = torch.empty(5000, dtype=to)
    assert copy_checksum(source, target) == checksum(source.to(to))
    assert torch.equal(target, source.to(to))


@pytest.mark.parametrize("shift", [0, 2, 64, 66])
def test_nothing_beside_the_target_is_written(way, shift):
    """At 0 and 64 the target of 4 MiB is written past the caches, at 2 and 66 not; both end within a block."""
    count = (2 << 20) + 1000
    memory = torch.full((count + 200,), 9, dtype=torch.bfloat16)
    address = memory.data_ptr() % 64 // 2
    start = 64 - address + shift // 2
    source = torch.randn(count, generator=torch.Generator().manual_seed(1))
    copy_checksum(source, memory[start : start + count], threads=2)
    assert (memory[:start] == 9).all()
    assert (memory[start + count :] == 9).all()
    assert torch.equal(memory[start : start + count], source.bfloat16())


def test_the_number_is_of_what_was_meant():
    """Taken on the way: a target that loses a bit afterwards has another."""
    source = torch.randn(10_000)
    target = torch.empty(10_000, dtype=torch.bfloat16)
    number = copy_checksum(source, target)
    target.view(torch.uint8)[777] ^= 16
    assert checksum(target) != number == checksum(source.bfloat16())


def test_gradients_are_left_alone(way):
    source = torch.randn(100, requires_grad=True)
    target = torch.empty(100, requires_grad=True)
    assert copy_checksum(source, target) == checksum(source)


# errors


def test_errors(way):
    square = torch.zeros(4, 4)
    with pytest.raises(ValueError, match=r"tensor: expected a contiguous tensor, got \[4, 4\] with strides \[1, 4\]"):
        checksum(square.t())
    with pytest.raises(ValueError, match="source: expected a contiguous"):
        copy_checksum(square.t(), square)
    with pytest.raises(ValueError, match="target: expected a contiguous"):
        copy_checksum(square, square.t())
    with pytest.raises(ValueError, match=r"target: expected \[4, 4\] as source, got \[16\]"):
        copy_checksum(square, torch.zeros(16))
    with pytest.raises(ValueError, match="threads: expected at least 1, got 0"):
        checksum(square, threads=0)
    with pytest.raises(ValueError, match="threads: expected at least 1, got -1"):
        copy_checksum(square, square.clone(), threads=-1)
