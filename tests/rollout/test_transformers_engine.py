"""The embedded engine against plain forward passes of the same weights, one sequence at a time, without padding or cache.

What the loss relies on: the reported log-probabilities are those of the distribution that was sampled from, whatever was batched
beside, and whatever the model folder's generation_config.json would like.
"""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

from rollout.engine import Decoding, EngineError, Request
from rollout.transformers_engine import TransformersEngine

VOCABULARY = 61
ENDS = (7, 3)


def model(tied: bool = True, seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.2,  # far from uniform, so that a wrong temperature or position shows
        eos_token_id=None,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config).eval()


def engine_of(
    reference: Qwen2ForCausalLM, *, version: int = 1, tokens_per_batch: int = 100_000, tied: bool = True
) -> TransformersEngine:
    """An engine whose own random weights were replaced by `reference`'s through `load`."""
    engine = TransformersEngine(model(tied, seed=99), end_token_ids=ENDS, tokens_per_batch=tokens_per_batch)
    engine.load(version, reference.named_parameters())
    return engine


@pytest.fixture(scope="module")
def reference():
    return model()


@pytest.fixture(scope="module")
def engine(reference):
    return engine_of(reference)


def requests(count: int = 12, seed: int = 0) -> list[Request]:
    """Prompts of 1 to 9 tokens, end tokens among them."""
    generator = np.random.default_rng(seed)
    return [Request(generator.integers(0, VOCABULARY, generator.integers(1, 10)).astype(np.int32)) for _ in range(count)]


@torch.no_grad()
def logprobs_of(reference, prompt, tokens, temperature):
    logits = reference(torch.tensor([[*prompt.tolist(), *tokens.tolist()]])).logits[0, len(prompt) - 1 : -1]
    return (logits.double() / temperature).log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens, dtype=torch.long)]


@torch.no_grad()
def argmax_decoding(reference, prompt, limit):
    tokens = prompt.tolist()
    for _ in range(limit):
        tokens.append(int(reference(torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] in ENDS:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_reported_logprobs_are_those_of_a_plain_forward(tied, temperature):
    reference = model(tied)
    asked = requests(24)
    samples = engine_of(reference, tied=tied).generate(asked, Decoding(20, temperature, seed=11))
    for request, sample in zip(asked, samples, strict=True):
        expected = logprobs_of(reference, request.prompt_token_ids, sample.token_ids, temperature)
        np.testing.assert_allclose(sample.logprobs, expected, atol=1e-5)
        assert sample.token_ids.dtype == np.int32
        assert sample.logprobs.dtype == np.float32
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_tokens_are_drawn_from_the_tempered_distribution(engine, reference, temperature):
    prompt = np.array([5, 40, 22], dtype=np.int32)
    samples = engine.generate([Request(prompt)] * 4000, Decoding(1, temperature, seed=3))
    drawn = np.bincount([sample.token_ids[0] for sample in samples], minlength=VOCABULARY) / len(samples)
    with torch.no_grad():
        expected = (reference(torch.tensor([prompt.tolist()])).logits[0, -1] / temperature).softmax(-1).numpy()
    assert 0.5 * np.abs(drawn - expected).sum() < 0.05, "total variation"


def test_end_token_is_kept_and_nothing_behind_it(engine):
    samples = engine.generate(requests(40), Decoding(12, seed=5))
    reasons = set()
    for sample in samples:
        ended = np.isin(sample.token_ids, ENDS)
        reasons.add((sample.finish_reason, len(sample.token_ids) == 12))
        assert not ended[:-1].any()
        assert ended[-1] == (sample.finish_reason == "stop")
        assert ended[-1] or len(sample.token_ids) == 12
        assert len(sample.token_ids) == len(sample.logprobs) >= 1
    assert ("stop", False) in reasons
    assert ("length", True) in reasons
    assert {int(sample.token_ids[-1]) for sample in samples if sample.finish_reason == "stop"} == set(ENDS), "both end an output"


@pytest.mark.parametrize("tokens_per_batch", [1, 50, 100_000])
def test_greedy_is_argmax_decoding_whatever_is_batched_beside(reference, tokens_per_batch):
    asked = requests(10, seed=2)
    progress = []
    engine = engine_of(reference, tokens_per_batch=tokens_per_batch)
    samples = engine.generate(asked, Decoding(15, greedy=True), lambda *counts: progress.append(counts))
    for request, sample in zip(asked, samples, strict=True):
        assert sample.token_ids.tolist() == argmax_decoding(reference, request.prompt_token_ids, 15)
    assert np.sum(progress, axis=0).tolist() == [10, sum(len(sample.token_ids) for sample in samples)]
    longest = max(len(request.prompt_token_ids) for request in asked) + 15
    batches = [counts for counts in progress if counts != (0, 0)]
    assert len(batches) == {1: 10, 100_000: 1}.get(tokens_per_batch, len(batches))
    assert len(progress) - len(batches) >= max(len(sample.token_ids) for sample in samples), "each token is a sign of life"
    assert len(progress) >= 10 * min(1, longest / tokens_per_batch) / 2


def test_top_p_keeps_the_nucleus_alone(engine, reference):
    prompt = np.array([5, 40, 22], dtype=np.int32)
    samples = engine.generate([Request(prompt)] * 500, Decoding(1, top_p=0.5, seed=3))
    with torch.no_grad():
        chances = reference(torch.tensor([prompt.tolist()])).logits[0, -1].softmax(-1)
    ordered = chances.sort(descending=True)
    nucleus = set(ordered.indices[: int((ordered.values.cumsum(0) < 0.5).sum()) + 1].tolist())
    assert {int(sample.token_ids[0]) for sample in samples} == nucleus


def test_same_seed_same_samples_and_the_global_random_state_is_untouched(engine):
    asked = requests(16)

    def tokens(seed):
        return [sample.token_ids.tolist() for sample in engine.generate(asked, Decoding(10, seed=seed))]

    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = tokens(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert tokens(1) == first
    assert tokens(2) != first


def test_equal_requests_get_different_samples(engine):
    samples = engine.generate([requests(1)[0]] * 8, Decoding(10, seed=4))
    assert len({tuple(sample.token_ids.tolist()) for sample in samples}) > 4


@pytest.mark.parametrize("greedy", [True, False])
def test_generation_config_of_the_model_folder_is_not_obeyed(reference, greedy):
    """Qwen2.5's asks for a repetition penalty, R1-Distill's for temperature 0.6 and top-p 0.95: none is part of the policy."""
    opinionated = model()
    opinionated.generation_config = GenerationConfig(
        do_sample=True, temperature=0.3, top_p=0.4, top_k=2, repetition_penalty=1.8, min_new_tokens=9, max_new_tokens=3
    )
    engine = TransformersEngine(opinionated, end_token_ids=ENDS, tokens_per_batch=100_000)
    engine.load(1, reference.named_parameters())
    decoding = Decoding(20, seed=11, greedy=greedy)
    samples, plain = engine.generate(requests(), decoding), engine_of(reference).generate(requests(), decoding)
    for one, other in zip(samples, plain, strict=True):
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.logprobs, other.logprobs)


def test_samples_carry_the_version_that_sampled_them(reference):
    engine = engine_of(reference, version=4)
    assert {sample.weight_version for sample in engine.generate(requests(3), Decoding(2))} == {4}
    other = model(seed=5)
    engine.load(5, other.named_parameters())
    samples = engine.generate(requests(3), Decoding(6, greedy=True))
    assert {sample.weight_version for sample in samples} == {5}
    for request, sample in zip(requests(3), samples, strict=True):
        assert sample.token_ids.tolist() == argmax_decoding(other, request.prompt_token_ids, 6)


def _broken(weights: dict[str, torch.Tensor], how: str):
    name = "model.layers.1.mlp.up_proj.weight"
    if how == "missing":
        del weights[name]
    elif how == "wrong shape":
        weights[name] = weights[name].T
    elif how == "unknown":
        weights = {"model.layers.2.mlp.up_proj.weight": weights[name], **weights}
    elif how == "unknown for known":
        weights = {"up": weights.pop(name), **weights}
    return iter([*weights.items(), *([(name, weights[name])] if how == "twice" else [])])


@pytest.mark.parametrize("how", ["missing", "wrong shape", "unknown", "unknown for known", "twice"])
def test_a_load_that_does_not_fit_is_refused_and_so_is_sampling_after_it(reference, how):
    engine = engine_of(reference)
    weights = _broken(dict(reference.named_parameters()), how)
    with pytest.raises(ValueError, match="weight"):
        engine.load(2, weights)
    assert next(weights, None) is None, "every rank must iterate to the end"
    with pytest.raises(EngineError, match="a push must come first"):
        engine.generate(requests(2), Decoding(2))
    engine.load(3, reference.named_parameters())
    assert engine.generate(requests(1), Decoding(2))[0].weight_version == 3


def test_a_load_that_breaks_off_leaves_no_version(reference):
    def breaks():
        yield next(iter(reference.named_parameters()))
        raise OSError("the peer is gone")

    engine = engine_of(reference)
    with pytest.raises(OSError, match="peer"):
        engine.load(2, breaks())
    with pytest.raises(EngineError, match="a push must come first"):
        engine.generate(requests(2), Decoding(2))


def test_sampling_before_the_first_load_is_refused():
    engine = TransformersEngine(model(), end_token_ids=ENDS, tokens_per_batch=100)
    with pytest.raises(EngineError, match="a push must come first"):
        engine.generate(requests(2), Decoding(2))


def test_no_requests_no_samples(engine):
    assert engine.generate([], Decoding(2)) == []
