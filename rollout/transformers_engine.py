"""The embedded engine: transformers' `generate` on a copy of the model, left-padded batches, any machine, no server.

It reports the log-probability of each sampled token under the distribution sampled from. `generate` can return every step's
scores, but that is [tokens, batch, V] in memory; a logits processor sees each step's scores anyway, and in the next step which
token was drawn from them, so it keeps one step alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from rollout.deadline import Deadline
from rollout.decode_attention import NAME as DECODE_ATTENTION
from rollout.engine import BatchGeneration, Decoding, EngineError, Progress, Request, drain
from rollout.types import Sample
from rollout.weights.source import WeightSource, take


class TransformersEngine:
    """model: a causal model of its own (not the trained one), in evaluation mode. end_token_ids: any of them ends an output.

    tokens_per_batch bounds sequences × (prompt + max_new_tokens) of one `generate` call. silence_seconds: deadline of each token,
    past which the process ends (`rollout.deadline`); None: no deadline.
    """

    name = "transformers"
    streams = False

    def __init__(
        self,
        model: nn.Module,
        *,
        end_token_ids: Sequence[int],
        tokens_per_batch: int,
        silence_seconds: float | None = None,
    ) -> None:
        self._silence_seconds = silence_seconds
        model.set_attn_implementation(DECODE_ATTENTION)
        self._model = model.requires_grad_(False).eval()
        # What `generate` is not told it takes from the model folder's generation_config.json, and a repetition penalty from there
        # would sample from another distribution than the one that is reported and trained.
        self._model.generation_config = GenerationConfig()
        self._end_token_ids = sorted(set(end_token_ids))
        self._tokens_per_batch = tokens_per_batch
        self._version: int | None = None
        self._device = next(model.parameters()).device

    @property
    def version(self) -> int | None:
        return self._version

    def ready(self) -> None:
        """It always is."""

    def load(self, version: int, source: WeightSource) -> None:
        """See `rollout.engine.Engine.load`."""
        self._version = None
        take(source, dict(self._model.named_parameters()))
        self._version = version

    def submit(self, requests: Sequence[Request], decoding: Decoding, progress: Progress | None = None) -> BatchGeneration:
        """See `rollout.engine.Engine.submit`. Nothing is sampled before the first `poll`."""
        if self._version is None:
            raise EngineError("the embedded engine has no complete weights: a push must come first")
        return BatchGeneration(self.sample, requests, decoding, progress)

    def generate(self, requests: Sequence[Request], decoding: Decoding, progress: Progress | None = None) -> list[Sample]:
        """All at once, in order."""
        return drain(self.submit(requests, decoding, progress), len(requests))

    def sample(self, requests: Sequence[Request], decoding: Decoding, progress: Progress | None) -> list[Sample]:
        """Samples all requests, in order. Leaves torch's global random state as it was."""
        samples: list[Sample | None] = [None] * len(requests)
        devices = [self._device] if self._device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), torch.inference_mode():
            torch.manual_seed(decoding.seed)
            for indices in self._batches(requests, decoding.max_new_tokens):
                batch = self._generate_batch([requests[index] for index in indices], decoding, progress)
                for index, sample in zip(indices, batch, strict=True):
                    samples[index] = sample
                if progress is not None:
                    progress(len(batch), sum(len(sample.token_ids) for sample in batch))
        return samples

    def sleep(self) -> None:
        """It keeps its copy of the model: meant for small ones."""

    def restart(self) -> None:
        """There is no process to start."""
        self._version = None

    def close(self) -> None:
        """Gives the model back."""
        del self._model

    def _batches(self, requests: Sequence[Request], max_new_tokens: int) -> Iterator[list[int]]:
        """Indices by prompt length, longest first, so that little is padded and the largest batch comes first."""
        order = sorted(range(len(requests)), key=lambda index: (-len(requests[index].prompt_token_ids), index))
        while order:
            longest = len(requests[order[0]].prompt_token_ids) + max_new_tokens
            count = max(1, self._tokens_per_batch // longest)
            yield order[:count]
            order = order[count:]

    def _generate_batch(self, requests: Sequence[Request], decoding: Decoding, progress: Progress | None) -> list[Sample]:
        width = max(len(request.prompt_token_ids) for request in requests)
        pad = self._end_token_ids[0]
        input_ids = torch.full((len(requests), width), pad, dtype=torch.long)
        mask = torch.zeros_like(input_ids)
        for row, request in enumerate(requests):
            prompt = torch.from_numpy(request.prompt_token_ids)
            input_ids[row, width - len(prompt) :] = prompt
            mask[row, width - len(prompt) :] = 1
        recorder = _SampledLogprobs(decoding.temperature)
        with self._deadline(len(requests)) as deadline:
            output = self._model.generate(
                input_ids.to(self._device),
                attention_mask=mask.to(self._device),
                logits_processor=LogitsProcessorList([recorder, _EachToken(deadline, progress)]),
                generation_config=GenerationConfig(
                    max_new_tokens=decoding.max_new_tokens,
                    do_sample=not decoding.greedy,
                    temperature=None if decoding.greedy else 1.0,
                    top_k=None if decoding.greedy else 0,
                    top_p=None if decoding.greedy else decoding.top_p,
                    eos_token_id=self._end_token_ids,
                    pad_token_id=pad,
                ),
            )
        tokens = output[:, width:].cpu().numpy().astype(np.int32)
        logprobs = recorder.finish(output).cpu().numpy()
        return [self._sample(row_tokens, row_logprobs) for row_tokens, row_logprobs in zip(tokens, logprobs, strict=True)]

    def _deadline(self, sequences: int) -> AbstractContextManager[Deadline | None]:
        if self._silence_seconds is None:
            return nullcontext()
        return Deadline(self._silence_seconds, f"the embedded engine's generate of {sequences} outputs")

    def _sample(self, tokens: np.ndarray, logprobs: np.ndarray) -> Sample:
        """Cuts a row after its first end token; a row without one ran into the limit."""
        ends = np.flatnonzero(np.isin(tokens, self._end_token_ids))
        count = int(ends[0]) + 1 if len(ends) else len(tokens)
        return Sample(tokens[:count].copy(), logprobs[:count].copy(), "stop" if len(ends) else "length", self._version)


class _EachToken(LogitsProcessor):
    """Says that it gets on."""

    def __init__(self, deadline: Deadline | None, progress: Progress | None) -> None:
        self._deadline, self._progress, self._count = deadline, progress, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 - transformers' signature
        self._count += 1
        if self._deadline is not None:
            self._deadline.at(f"token {self._count}")
        if self._progress is not None:
            self._progress(0, 0)
        return scores


class _SampledLogprobs(LogitsProcessor):
    """Divides by the temperature (so that transformers' own warpers, which run later, need not) and records what each drawn
    token's log-probability was in the step before."""

    def __init__(self, temperature: float) -> None:
        self._temperature = temperature
        self._previous: Tensor | None = None
        self._columns: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._record(input_ids)
        scores = scores.float() / self._temperature
        self._previous = scores.log_softmax(-1)
        return scores

    def finish(self, output: Tensor) -> Tensor:
        """Log-probabilities [batch, new tokens], fp32."""
        self._record(output)
        return torch.stack(self._columns, dim=1)

    def _record(self, input_ids: Tensor) -> None:
        if self._previous is not None:
            self._columns.append(self._previous.gather(1, input_ids[:, -1:]).squeeze(1))
