"""What every embedded engine is held to, against plain forward passes of the same weights, one sequence at a time, without
padding or cache: the reported log-probabilities are those of the distribution that was sampled from, whatever was batched beside;
the version is that of the weights, or None; and a push proves it.

A test file has a subclass of EngineContract that says how an engine is made.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tiny_models import ModelSource
from transformers import Qwen2Config, Qwen2ForCausalLM

from rollout.engine import Decoding, Engine, EngineError, Request, drain
from rollout.ranks import Ranks
from rollout.types import Sample
from rollout.weights.sync import Probe, WeightSync

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


def requests(count: int = 12, seed: int = 0) -> list[Request]:
    """Prompts of 1 to 9 tokens, end tokens among them."""
    generator = np.random.default_rng(seed)
    return [
        Request(generator.integers(0, VOCABULARY, generator.integers(1, 10)).astype(np.int32), place) for place in range(count)
    ]


def generate(engine: Engine, asked: Sequence[Request], decoding: Decoding) -> list[Sample]:
    return drain(engine.submit(asked, decoding), len(asked))


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


class EngineContract:
    draws, variation = 4000, 0.05
    """How many tokens are drawn of one distribution, and how far they may be off it in total variation."""

    def make(self, policy: Qwen2ForCausalLM) -> Engine:
        """policy: the engine's own copy, with other weights. End tokens: ENDS."""
        raise NotImplementedError

    def loaded(self, reference: Qwen2ForCausalLM, version: int = 1, tied: bool = True) -> Engine:
        """An engine whose own random weights were replaced by the reference's."""
        engine = self.make(model(tied, seed=99))
        engine.load(version, reference.named_parameters())
        return engine

    @pytest.fixture(scope="class")
    @classmethod
    def reference(cls):
        return model()

    @pytest.fixture(scope="class")
    @classmethod
    def engine(cls, reference):
        return cls().loaded(reference)

    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    def test_reported_logprobs_are_those_of_a_plain_forward(self, tied, temperature):
        reference = model(tied)
        asked = requests(24)
        samples = generate(self.loaded(reference, tied=tied), asked, Decoding(20, temperature, seed=11))
        for request, sample in zip(asked, samples, strict=True):
            expected = logprobs_of(reference, request.prompt_token_ids, sample.token_ids, temperature)
            np.testing.assert_allclose(sample.logprobs, expected, atol=1e-5)
            assert sample.token_ids.dtype == np.int32
            assert sample.logprobs.dtype == np.float32
        assert {sample.finish_reason for sample in samples} == {"stop", "length"}

    @pytest.mark.parametrize("temperature", [1.0, 0.5])
    def test_tokens_are_drawn_from_the_tempered_distribution(self, engine, reference, temperature):
        prompt = np.array([5, 40, 22], dtype=np.int32)
        samples = generate(engine, [Request(prompt, seed) for seed in range(self.draws)], Decoding(1, temperature, seed=3))
        drawn = np.bincount([sample.token_ids[0] for sample in samples], minlength=VOCABULARY) / len(samples)
        with torch.no_grad():
            expected = (reference(torch.tensor([prompt.tolist()])).logits[0, -1] / temperature).softmax(-1).numpy()
        assert 0.5 * np.abs(drawn - expected).sum() < self.variation, "total variation"

    def test_end_token_is_kept_and_nothing_behind_it(self, engine):
        samples = generate(engine, requests(40), Decoding(12, seed=5))
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
        ends = {int(sample.token_ids[-1]) for sample in samples if sample.finish_reason == "stop"}
        assert ends == set(ENDS), "both end an output"

    def test_greedy_is_argmax_decoding(self, engine, reference):
        asked = requests(10, seed=2)
        for request, sample in zip(asked, generate(engine, asked, Decoding(15, greedy=True)), strict=True):
            assert sample.token_ids.tolist() == argmax_decoding(reference, request.prompt_token_ids, 15)

    def test_top_p_keeps_the_nucleus_alone(self, engine, reference):
        prompt = np.array([5, 40, 22], dtype=np.int32)
        samples = generate(engine, [Request(prompt, seed) for seed in range(500)], Decoding(1, top_p=0.5, seed=3))
        with torch.no_grad():
            chances = reference(torch.tensor([prompt.tolist()])).logits[0, -1].softmax(-1)
        ordered = chances.sort(descending=True)
        nucleus = set(ordered.indices[: int((ordered.values.cumsum(0) < 0.5).sum()) + 1].tolist())
        assert {int(sample.token_ids[0]) for sample in samples} == nucleus

    def test_same_seed_same_samples_and_the_global_random_state_is_untouched(self, engine):
        asked = requests(16)

        def tokens(seed):
            again = [Request(request.prompt_token_ids, request.seed + 100 * seed) for request in asked]
            return [sample.token_ids.tolist() for sample in generate(engine, again, Decoding(10, seed=seed))]

        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = tokens(1)
        assert torch.equal(torch.get_rng_state(), before)
        torch.rand(3)
        assert tokens(1) == first
        assert tokens(2) != first

    def test_equal_prompts_get_different_samples(self, engine):
        prompt = requests(1)[0].prompt_token_ids
        samples = generate(engine, [Request(prompt, seed) for seed in range(8)], Decoding(10, seed=4))
        assert len({tuple(sample.token_ids.tolist()) for sample in samples}) > 4

    def test_samples_carry_the_version_that_sampled_them(self, reference):
        engine = self.loaded(reference, version=4)
        assert {sample.weight_version for sample in generate(engine, requests(3), Decoding(2))} == {4}
        other = model(seed=5)
        engine.load(5, other.named_parameters())
        samples = generate(engine, requests(3), Decoding(6, greedy=True))
        assert {sample.weight_version for sample in samples} == {5}
        for request, sample in zip(requests(3), samples, strict=True):
            assert sample.token_ids.tolist() == argmax_decoding(other, request.prompt_token_ids, 6)

    @pytest.mark.parametrize("how", ["missing", "wrong shape", "unknown", "unknown for known", "twice"])
    def test_a_load_that_does_not_fit_is_refused_and_so_is_sampling_after_it(self, reference, how):
        engine = self.loaded(reference)
        weights = _broken(dict(reference.named_parameters()), how)
        with pytest.raises(ValueError, match="weight"):
            engine.load(2, weights)
        assert next(weights, None) is None, "every rank must iterate to the end"
        assert engine.version is None
        with pytest.raises(EngineError, match="a push must come first"):
            generate(engine, requests(2), Decoding(2))
        engine.load(3, reference.named_parameters())
        assert generate(engine, requests(1), Decoding(2))[0].weight_version == 3

    def test_a_load_that_breaks_off_leaves_no_version(self, reference):
        def breaks():
            yield next(iter(reference.named_parameters()))
            raise OSError("the peer is gone")

        engine = self.loaded(reference)
        with pytest.raises(OSError, match="peer"):
            engine.load(2, breaks())
        with pytest.raises(EngineError, match="a push must come first"):
            generate(engine, requests(2), Decoding(2))

    def test_sampling_before_the_first_load_or_after_a_restart_is_refused(self, reference):
        restarted = self.loaded(reference)
        restarted.restart()
        for engine in (self.make(model()), restarted):
            with pytest.raises(EngineError, match="a push must come first"):
                generate(engine, requests(2), Decoding(2))

    def test_no_requests_no_samples(self, engine):
        assert generate(engine, [], Decoding(2)) == []

    def test_a_push_proves_itself_and_a_sampler_of_other_weights_is_found(self, reference):
        def score(prompts, responses):
            return [logprobs_of(reference, *pair, 1.0).float().numpy() for pair in zip(prompts, responses, strict=True)]

        probe = Probe.of(VOCABULARY, 20, bound=1e-3)
        sync = WeightSync(self.make(model(seed=99)), ModelSource(reference), Ranks(), score=score, probe=probe)
        sync.push(1)
        assert sync.worst < 1e-4
        wrong = ModelSource(reference, lambda name, weight: 1.1 * weight if name == "model.norm.weight" else weight)
        with pytest.raises(EngineError, match="the engine's log-probabilities are off the policy's"):
            WeightSync(self.make(model(seed=99)), wrong, Ranks(), score=score, probe=probe).push(1)


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
