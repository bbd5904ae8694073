"""The plan of a push and what lies in a buffer: nothing overlaps, no layer is torn, and what is read is what was written."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rollout.weights.buffers import ALIGNMENT, SharedBuffer, aligned
from rollout.weights.source import TensorMeta, layers
from rollout.weights.wire import FLOAT8, FLOAT8_MAX, check, dequantize, largest, plan, quantize, read, write

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


def meta(name: str, *shape: int) -> TensorMeta:
    return TensorMeta(name, FLOAT32, shape)


@st.composite
def models(draw: st.DrawFn) -> list[TensorMeta]:
    """Embedding, layers of any tensors, norm and head."""
    size = st.integers(1, 40)
    shapes = st.one_of(st.tuples(size), st.tuples(size, size))
    metadata = [meta("model.embed_tokens.weight", draw(st.integers(1, 200)), draw(size))]
    for layer in range(draw(st.integers(0, 6))):
        names = draw(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6, unique=True))
        metadata += [meta(f"model.layers.{layer}.{name}.weight", *draw(shapes)) for name in names]
    metadata.append(meta("model.norm.weight", draw(size)))
    if draw(st.booleans()):
        metadata.append(meta("lm_head.weight", draw(st.integers(1, 200)), draw(size)))
    return metadata


@given(models(), st.sampled_from([BFLOAT16, FLOAT32]), st.sampled_from(["engine", "float8"]), st.integers(1, 20_000))
@settings(max_examples=200, deadline=None)
def test_a_plan_keeps_its_promises(metadata, dtype, wire, least_bytes):
    chunks = plan(metadata, dtype, wire, least_bytes)
    assert [place.meta for chunk in chunks for place in chunk] == metadata, "each tensor once, in order"
    for chunk in chunks:
        end = 0
        for place in chunk:
            assert place.offset % ALIGNMENT == 0
            assert place.offset >= end, "they do not overlap"
            end = place.offset + place.nbytes
            if place.scale_offset is not None:
                assert place.scale_offset % ALIGNMENT == 0
                assert place.scale_offset >= end
                end = place.scale_offset + 4 * place.meta.shape[0]
            assert place.end == end
        assert end <= largest(chunks)
    whole = layers(metadata)
    for chunk in chunks:
        names = {place.meta.name for place in chunk}
        for layer in whole:
            assert names >= {one.name for one in layer} or names.isdisjoint({one.name for one in layer}), "no layer is torn"
    for chunk, following in itertools.pairwise(chunks):
        groups = sum(chunk[0].meta in layer or layer[0] in [place.meta for place in chunk] for layer in whole)
        assert chunk[-1].end <= least_bytes or groups == 1, "more than asked for only where one layer is"
        first = next(layer for layer in whole if layer[0] == following[0].meta)
        room = plan(first, dtype, wire, 1 << 40)[0][-1].end
        assert aligned(chunk[-1].end) + room > least_bytes, "the next layer would not have fitted"


def test_a_plan_by_hand():
    metadata = [
        meta("model.embed_tokens.weight", 10, 8),
        meta("model.layers.0.mlp.up_proj.weight", 4, 8),
        meta("model.layers.0.self_attn.q_proj.bias", 8),
        meta("model.norm.weight", 8),
    ]
    (chunk,) = plan(metadata, BFLOAT16, "float8", 1000)
    assert [(place.dtype, place.offset, place.scale_offset, place.end) for place in chunk] == [
        (BFLOAT16, 0, None, 160),  # an embedding keeps the engine's dtype
        (FLOAT8, 192, 256, 272),
        (BFLOAT16, 320, None, 336),
        (BFLOAT16, 384, None, 400),
    ]
    assert [len(chunk) for chunk in plan(metadata, BFLOAT16, "float8", 1)] == [1, 2, 1]
    assert plan([], BFLOAT16, "engine", 1) == []
    assert largest([]) == 0


def test_layers_are_told_by_their_number():
    names = ["a.weight", "h.0.x", "h.0.y", "h.1.x", "h.10.x", "h.10.experts.3.w", "h.10.experts.4.w", "b.weight", "c.weight"]
    grouped = [[one.name for one in group] for group in layers([meta(name, 1) for name in names])]
    assert grouped == [["a.weight"], ["h.0.x", "h.0.y"], ["h.1.x"], names[4:7], ["b.weight"], ["c.weight"]]


# what lies in the buffer


def sent(tensor: torch.Tensor, dtype: torch.dtype, wire: str = "engine", name: str = "model.layers.0.mlp.up_proj.weight"):
    """(entry, as it comes out of JSON; the buffer)."""
    ((place,),) = plan([meta(name, *tensor.shape)], dtype, wire, 1)
    buffer = SharedBuffer(max(place.end, 1))
    try:
        return json.loads(json.dumps(write(tensor, place, buffer))), buffer.bytes
    finally:
        buffer.close()


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
def test_what_is_read_is_what_was_written(dtype):
    tensor = torch.randn(33, 65)
    entry, buffer = sent(tensor, dtype)
    check(entry, buffer)
    got = read(entry, buffer, dtype)
    assert torch.equal(got, tensor.to(dtype))
    assert got.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr(), "nothing is copied"


def test_a_tensor_that_is_no_rectangle_of_memory():
    tensor = torch.randn(65, 33).t()
    entry, buffer = sent(tensor, FLOAT32)
    assert torch.equal(read(entry, buffer, FLOAT32), tensor)


@pytest.mark.parametrize("wire", ["engine", "float8"])
def test_any_flipped_bit_is_refused(wire):
    entry, buffer = sent(torch.randn(9, 7), BFLOAT16, wire)
    parts = [(entry["offset"], entry["bytes"])]
    if wire == "float8":
        parts.append((entry["scale"]["offset"], entry["scale"]["bytes"]))
    for offset, count in parts:
        for place in range(offset, offset + count):
            for bit in range(8):
                buffer[place] ^= 1 << bit
                with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp\.up_proj\.weight.*are not those sent \(checksum\)"):
                    check(entry, buffer)
                buffer[place] ^= 1 << bit
    check(entry, buffer)


def test_a_buffer_that_is_too_short_is_refused():
    entry, buffer = sent(torch.randn(9, 7), FLOAT32)
    with pytest.raises(ValueError, match="checksum"):
        check(entry, buffer[:-1])


# float8


@given(st.integers(1, 20), st.integers(1, 50), st.integers(0, 2**31), st.floats(-35, 30))
@settings(max_examples=150, deadline=None)
def test_float8_is_off_by_a_sixteenth_or_a_fraction_of_its_channel(rows, columns, seed, magnitude):
    """e4m3 has 3 bits behind the point: half of the last is 2^-4 of the number; below 2^-6, steps of 2^-9 of the scale."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 10.0**magnitude
    quantized, scale = quantize(weight)
    assert quantized.dtype == FLOAT8
    assert scale.shape == (rows,)
    back = dequantize(quantized, scale, FLOAT32).double()
    bound = torch.maximum(weight.double().abs() / 16, scale.double().unsqueeze(1) / 1024) * (1 + 1e-5)
    assert ((back - weight).abs() <= bound).all()
    largest_of = weight.abs().amax(1)
    exact = largest_of > 1e-30
    torch.testing.assert_close(back.abs().amax(1)[exact], largest_of.double()[exact], rtol=1e-6, atol=0)


def test_float8_of_nothing_of_zeros_and_of_what_is_not_finite():
    weight = torch.zeros(4, 3)
    weight[1, 1], weight[2, 0], weight[3] = 1e-45, float("inf"), torch.tensor([1.0, float("nan"), 2.0])
    back = dequantize(*quantize(weight), FLOAT32)
    assert (back[0] == 0).all()
    assert back[1].isfinite().all()
    assert not back[2].isfinite().all(), "infinity must not become a number"
    assert back[3].isnan().all()
    assert dequantize(*quantize(torch.full((1, 2), FLOAT8_MAX)), FLOAT32).tolist() == [[FLOAT8_MAX, FLOAT8_MAX]]


def test_float8_over_the_wire_is_quantize_and_dequantize():
    weight = torch.randn(31, 17)
    entry, buffer = sent(weight, BFLOAT16, "float8")
    check(entry, buffer)
    assert entry["dtype"] == "float8_e4m3fn"
    got = read(entry, buffer, BFLOAT16)
    assert got.dtype == BFLOAT16
    assert torch.equal(got, dequantize(*quantize(weight), BFLOAT16))
