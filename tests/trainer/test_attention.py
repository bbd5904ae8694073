"""Packed attention against the model of transformers itself, one sequence at a time with its own causal attention.

It shows that no document sees another, and that padding inside a bucket changes neither outputs nor gradients. It does not show
that one causal attention is right: that is transformers' own.
"""

import itertools
import re
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.varlen
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2Config, Qwen2ForCausalLM

from rollout.errors import InputError
from trainer.attention import MIN_FILL, NAME, Attention, SequenceLayout, attention_kernel, packed_attention

CPU = torch.device("cpu")
LENGTHS = {
    "one": [7],
    "single tokens": [1, 1, 1],
    "alike": [9, 10, 8, 10],
    "wildly different": [1, 97, 2, 30, 96, 1, 29, 68, 5],
}


def model(attention: str, dtype: torch.dtype, key_value_heads: int) -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=key_value_heads, max_position_embeddings=128, initializer_range=0.3, attn_implementation=attention,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).to(dtype)


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)])
def test_packed_is_as_one_at_a_time(name, dtype, tolerance, key_value_heads):
    lengths = LENGTHS[name]
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(50, (length,), generator=generator) for length in lengths]
    d_hidden = [torch.randn(length, 32, generator=generator, dtype=dtype) for length in lengths]

    alone = model("sdpa", dtype, key_value_heads).model
    expected = [alone(input_ids=ids.unsqueeze(0), use_cache=False).last_hidden_state[0] for ids in sequences]
    torch.autograd.backward(expected, d_hidden)

    packed = model(NAME, dtype, key_value_heads).model
    hidden = packed(
        input_ids=torch.cat(sequences).unsqueeze(0),
        position_ids=torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0),
        layout=SequenceLayout.of(lengths, CPU),
        use_cache=False,
    ).last_hidden_state[0]
    hidden.backward(torch.cat(d_hidden))

    assert (hidden - torch.cat(expected)).abs().max() <= tolerance * torch.cat(expected).abs().max()
    for (weight, one), (_, other) in zip(packed.named_parameters(), alone.named_parameters(), strict=True):
        scale = max(1.0, other.grad.abs().max().item())
        assert (one.grad - other.grad).abs().max() <= 10 * tolerance * scale, weight


def test_documents_do_not_see_each_other():
    """Whatever stands beside it, a sequence's outputs stay bitwise what they were, and its inputs get no gradient from there."""
    lengths = [5, 6, 30]
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(1, heads, 41, 8, generator=generator) for heads in (4, 2, 2))
    module = torch.nn.Identity()
    layout = SequenceLayout.of(lengths, CPU)
    before, _ = packed_attention(module, query, key, value, None, scaling=0.3, layout=layout)
    value.requires_grad_()
    packed_attention(module, query, key, value, None, scaling=0.3, layout=layout)[0][:, 5:11].sum().backward()
    touched = value.grad.abs().sum((0, 1, 3)) > 0
    assert touched.tolist() == [False] * 5 + [True] * 6 + [False] * 30
    changed = [tensor.detach().clone() for tensor in (query, key, value)]
    for tensor in changed:
        tensor[:, :, :5] += 1
    after, _ = packed_attention(module, *changed, None, scaling=0.3, layout=layout)
    assert torch.equal(before[:, 5:], after[:, 5:])
    assert not torch.equal(before[:, :5], after[:, :5])


def test_a_mask_is_refused():
    tensor = torch.zeros(1, 1, 2, 4)
    layout = SequenceLayout.of([2], CPU)
    with pytest.raises(ValueError, match="takes no mask"):
        packed_attention(torch.nn.Identity(), tensor, tensor, tensor, torch.zeros(2, 2), scaling=1.0, layout=layout)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 80), min_size=1, max_size=20))
def test_layout(lengths):
    """Bucket rows carry each sequence whole and in order, restore_T undoes them, and a bucket is filled to MIN_FILL."""
    layout = SequenceLayout.of(lengths, CPU)
    laid = torch.cat([rows for _, _, rows in layout.buckets])
    assert torch.equal(laid[layout.restore_T], torch.arange(sum(lengths)))
    assert sum(count for count, _, _ in layout.buckets) == len(lengths)
    assert len(laid) * MIN_FILL <= sum(lengths)
    starts = {sum(lengths[:index]): lengths[index] for index in range(len(lengths))}
    for count, longest, rows in layout.buckets:
        for line in rows.reshape(count, longest).tolist():
            length = starts[line[0]]
            assert line[:length] == list(range(line[0], line[0] + length))
            assert length >= MIN_FILL * longest


def per_sequence(query, key, value, ends, scale):
    """[T, heads, d] → the same, one sequence at a time."""
    outputs = []
    for start, end in itertools.pairwise(ends.tolist()):
        q, k, v = (tensor[start:end].transpose(0, 1).unsqueeze(0) for tensor in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


class TestGpuKernels:
    """What is handed to the kernels that need a GPU: in their place stands a function of the same signature and meaning."""

    LENGTHS = (5, 1, 9)

    def tensors(self):
        generator = torch.Generator().manual_seed(3)
        return [torch.randn(1, heads, 15, 8, generator=generator) for heads in (4, 2, 2)]

    def attended(self, kernel: str) -> torch.Tensor:
        layout = SequenceLayout.of(self.LENGTHS, CPU, Attention(kernel))
        return packed_attention(torch.nn.Identity(), *self.tensors(), None, scaling=0.3, layout=layout)[0]

    def test_varlen(self, monkeypatch):
        def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
            assert window_size == (-1, 0)
            assert enable_gqa
            assert (max_q, max_k) == (9, 9)
            assert cu_seq_q.dtype == torch.int32
            assert cu_seq_q is cu_seq_k
            return per_sequence(query, key, value, cu_seq_q, scale)

        monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen_attn)
        assert torch.allclose(self.attended("varlen"), self.attended("sdpa"), atol=1e-6)

    def test_flash(self, monkeypatch):
        def flash_attn_varlen_func(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.5, softmax_scale=None, causal=False
        ):
            assert causal
            assert dropout_p == 0.0
            assert (max_seqlen_q, max_seqlen_k) == (9, 9)
            assert cu_seqlens_q is cu_seqlens_k
            return per_sequence(q, k, v, cu_seqlens_q, softmax_scale)

        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
        assert torch.allclose(self.attended("flash"), self.attended("sdpa"), atol=1e-6)

    @pytest.mark.parametrize(
        ("device", "dtype", "packages", "expected"),
        [
            ("cpu", torch.bfloat16, ("flash_attn", "torch.nn.attention.varlen"), "sdpa"),
            ("cuda", torch.float32, ("flash_attn", "torch.nn.attention.varlen"), "sdpa"),
            ("cuda", torch.bfloat16, ("flash_attn", "torch.nn.attention.varlen"), "flash"),
            ("cuda", torch.bfloat16, ("torch.nn.attention.varlen",), "varlen"),
            ("cuda", torch.bfloat16, (), "sdpa"),
        ],
    )
    def test_the_best_that_is_there(self, monkeypatch, device, dtype, packages, expected):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name in packages else None)
        monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=None))
        for name in ("flash_attn", "torch.nn.attention.varlen"):
            if name not in packages:
                monkeypatch.setitem(sys.modules, name, None)
        assert attention_kernel("auto", torch.device(device), dtype) == expected
        for kernel, package in (("flash", "flash_attn"), ("varlen", "torch.nn.attention.varlen")):
            if device == "cuda" and dtype == torch.bfloat16 and package in packages:
                assert attention_kernel(kernel, torch.device(device), dtype) == kernel
            else:
                with pytest.raises(InputError, match=f"model.attention: {kernel} needs"):
                    attention_kernel(kernel, torch.device(device), dtype)
        assert attention_kernel("sdpa", torch.device(device), dtype) == "sdpa"

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            (None, "ImportError: cannot import name 'flash_attn_varlen_func' from 'flash_attn'"),
            ("raise ImportError('undefined symbol: _ZN3c104cuda')", "ImportError: undefined symbol: _ZN3c104cuda"),
            ("raise OSError('libcudart.so.12: no such file')", "OSError: libcudart.so.12: no such file"),
        ],
        ids=["flash-attn-4 alone", "built for another torch", "built for another CUDA"],
    )
    def test_a_flash_attn_that_does_not_load_is_not_taken(self, monkeypatch, tmp_path, content, why):
        (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
        if content is not None:
            (tmp_path / "flash_attn" / "__init__.py").write_text(content)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
        cuda = torch.device("cuda")
        with pytest.warns(UserWarning, match="the flash-attn that is installed does not load: " + re.escape(why)):
            assert attention_kernel("auto", cuda, torch.bfloat16) == "varlen"
        with (
            pytest.warns(UserWarning, match="does not load"),
            pytest.raises(InputError, match=re.escape(f"model.attention: flash needs a flash-attn that loads ({why}")),
        ):
            attention_kernel("flash", cuda, torch.bfloat16)
        sys.modules.pop("flash_attn", None)

    def test_a_varlen_that_does_not_know_what_it_is_asked_is_not_taken(self, monkeypatch):
        def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)): ...

        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        cuda = torch.device("cuda")
        assert attention_kernel("auto", cuda, torch.bfloat16) == "varlen"
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=varlen_attn))
        assert attention_kernel("auto", cuda, torch.bfloat16) == "sdpa"
        with pytest.raises(InputError, match="varlen needs a torch whose varlen_attn has enable_gqa"):
            attention_kernel("varlen", cuda, torch.bfloat16)
