"""The embedded engine: the contract of all of them, and what is its own: batches, progress, and a model folder's
generation_config.json, which would like another distribution."""

import numpy as np
import pytest
from engine_contract import ENDS, EngineContract, argmax_decoding, generate, model, requests
from transformers import GenerationConfig

from rollout.engine import Decoding
from rollout.transformers_engine import TransformersEngine


class TestTransformersEngine(EngineContract):
    def make(self, policy, tokens_per_batch: int = 100_000):
        return TransformersEngine(policy, end_token_ids=ENDS, tokens_per_batch=tokens_per_batch)

    @pytest.mark.parametrize("tokens_per_batch", [1, 50, 100_000])
    def test_greedy_does_not_depend_on_what_is_batched_beside(self, reference, tokens_per_batch):
        asked = requests(10, seed=2)
        progress = []
        engine = self.make(model(seed=99), tokens_per_batch)
        engine.load(1, reference.named_parameters())
        samples = engine.generate(asked, Decoding(15, greedy=True), lambda *counts: progress.append(counts))
        for request, sample in zip(asked, samples, strict=True):
            assert sample.token_ids.tolist() == argmax_decoding(reference, request.prompt_token_ids, 15)
        assert np.sum(progress, axis=0).tolist() == [10, sum(len(sample.token_ids) for sample in samples)]
        longest = max(len(request.prompt_token_ids) for request in asked) + 15
        batches = [counts for counts in progress if counts != (0, 0)]
        assert len(batches) == {1: 10, 100_000: 1}.get(tokens_per_batch, len(batches))
        assert len(progress) - len(batches) >= max(len(sample.token_ids) for sample in samples), "each token is a sign of life"
        assert len(progress) >= 10 * min(1, longest / tokens_per_batch) / 2

    @pytest.mark.parametrize("greedy", [True, False])
    def test_generation_config_of_the_model_folder_is_not_obeyed(self, engine, reference, greedy):
        """Qwen2.5's asks for a repetition penalty, R1-Distill's for temperature 0.6 and top-p 0.95: no part of the policy."""
        opinionated = model()
        opinionated.generation_config = GenerationConfig(
            do_sample=True, temperature=0.3, top_p=0.4, top_k=2, repetition_penalty=1.8, min_new_tokens=9, max_new_tokens=3
        )
        one = self.make(opinionated)
        one.load(1, reference.named_parameters())
        decoding = Decoding(20, seed=11, greedy=greedy)
        for mine, plain in zip(*(generate(each, requests(), decoding) for each in (one, engine)), strict=True):
            np.testing.assert_array_equal(mine.token_ids, plain.token_ids)
            np.testing.assert_array_equal(mine.logprobs, plain.logprobs)
