"""The process that holds a colocated vLLM: `python -m rollout.vllm.worker FD`, started by `rollout.vllm.child`, one a rank.

vLLM runs inside this very process, so that nothing outlives it; it dies with the rank that started it, and when that rank closes
its end of the socket. Tensor parallel, the model lies in processes that vLLM spawns from this one, and they die with it.
It answers one message after the other, and samples between them.

| asked                                                 | answered                                                            |
|-------------------------------------------------------|---------------------------------------------------------------------|
| (settings, as the first line)                         | ready                                                               |
| generate (requests: token ids, seeds; how to decode)  | samples, as they finish; progress, at least once a second           |
| score (sequences: token ids)                          | scores, as they finish; progress                                    |
| abort                                                 | aborted                                                             |
| begin, connect, chunk, commit                         | done, or refused with a reason                                      |
| adopt (version), instead of those four                | done: the folder's own weights are that version                     |
| sleep, wake (tags)                                    | done                                                                |

After `begin` nothing is sampled until `commit`.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import time
from typing import Any

PROGRESS_SECONDS = 0.5
PREFILL_TOKENS = 8192
"""Prompt tokens computed at once, at least a whole longest one."""
TOP_P_OFF = 1.0


def main(descriptor: int) -> int:
    _die_with_parent()
    from rollout.vllm.channel import Channel, ChannelClosed
    from rollout.vllm.settings import VllmSettings

    # Buffered: decoding goes on while the rank has other things to do than to read.
    channel = Channel(socket.socket(fileno=descriptor), buffered=True)
    try:
        settings = VllmSettings.from_json(channel.receive(None)["settings"])
        worker = Worker(settings, channel)
        channel.send("ready")
        worker.serve()
    except ChannelClosed:
        return 0
    return 0


class Worker:
    """One engine and its end of the channel."""

    def __init__(self, settings: Any, channel: Any) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        from rollout.vllm.transfer import BACKEND, EXTENSION, register

        register()
        self._channel = channel
        self._engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=settings.model,
                dtype=settings.dtype,
                max_model_len=settings.max_model_len,
                max_num_seqs=settings.max_sequences,
                seed=settings.seed,
                # random: what a push leaves out cannot pass for the policy's
                load_format="safetensors" if settings.stored else "dummy",
                skip_tokenizer_init=True,
                enforce_eager=_on_cpu(),
                enable_prefix_caching=True,
                # On a CPU a request with a seed dies when its prompt is cut: vLLM would wind back its generator, which CPUs'
                # cannot.
                enable_chunked_prefill=not _on_cpu(),
                max_num_batched_tokens=max(settings.max_model_len, PREFILL_TOKENS),
                logprobs_mode="processed_logprobs",  # under the distribution sampled from, temperature included
                tensor_parallel_size=settings.tensor_parallel,
                worker_extension_cls=EXTENSION,
                weight_transfer_config={"backend": BACKEND},
                generation_config="vllm",  # not the folder's: it may hold a repetition penalty
                disable_log_stats=True,
                enable_sleep_mode=settings.sleep,
                **settings.memory_arguments(),
            )
        )
        self._version: int | None = None
        self._coming: int | None = None
        self._stored = settings.stored
        self._max_sequences = settings.max_sequences
        self._places: dict[str, int] = {}
        self._sampled = 0
        self._reported = time.monotonic()
        self._serial = 0

    def serve(self) -> None:
        """Until the channel closes."""
        while True:
            message = self._channel.receive(0.0 if self._places else None)
            if message is not None:
                self._answer(message)
            if self._places:
                self._step()

    def _answer(self, message: dict[str, Any]) -> None:
        kind = message.pop("kind")
        try:
            fields = getattr(self, f"_on_{kind}")(**message)
        except Exception as error:
            # The parent decides what becomes of this engine; what it holds now is of no version.
            self._version = None
            self._channel.send("refused", why=f"{type(error).__name__}: {error}")
        else:
            if fields is not None:
                self._channel.send(**fields)

    # sampling

    def _on_generate(self, prompts: Any, lengths: Any, places: Any, seeds: Any, version: int, decoding: dict[str, Any]) -> None:
        """prompts: all token ids end to end; lengths, places, seeds: of each request."""
        if version != self._version:
            raise RuntimeError(f"asked to sample from version {version}, holds {self._version}")
        start = 0
        for length, place, seed in zip(lengths.tolist(), places.tolist(), seeds.tolist(), strict=True):
            self._serial += 1
            name = str(self._serial)
            self._places[name] = place
            prompt = {"prompt_token_ids": prompts[start : start + length].tolist()}
            self._engine.add_request(name, prompt, self._parameters(seed, **decoding))
            start += length

    @staticmethod
    def _parameters(
        seed: int, max_new_tokens: int, temperature: float, top_p: float, greedy: bool, end_token_ids: list[int]
    ) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            max_tokens=max_new_tokens,
            temperature=0.0 if greedy else temperature,
            top_p=TOP_P_OFF if greedy else top_p,
            seed=None if greedy else seed,
            stop_token_ids=end_token_ids,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _on_score(self, prompts: Any, lengths: Any, places: Any, version: int) -> None:
        """As `_on_generate`; each at least two tokens long."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if version != self._version:
            raise RuntimeError(f"asked to score with version {version}, holds {self._version}")
        once = SamplingParams(
            max_tokens=1,  # vLLM demands one
            temperature=0.0,
            prompt_logprobs=1,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        start = 0
        for length, place in zip(lengths.tolist(), places.tolist(), strict=True):
            self._serial += 1
            name = str(self._serial)
            self._places[name] = place
            self._engine.add_request(name, {"prompt_token_ids": prompts[start : start + length].tolist()}, once)
            start += length

    def _on_abort(self) -> dict[str, Any]:
        self._engine.abort_request(list(self._places))
        self._places.clear()
        return {"kind": "aborted"}

    def _step(self) -> None:
        finished = [output for output in self._engine.step() if output.finished and output.request_id in self._places]
        self._sampled += min(len(self._places), self._max_sequences)
        scored = [output for output in finished if output.prompt_logprobs is not None]
        sampled = [output for output in finished if output.prompt_logprobs is None]
        if scored:
            self._send_scores(scored)
        if sampled:
            self._send_samples(sampled)
        now = time.monotonic()
        if now - self._reported > PROGRESS_SECONDS:
            self._channel.send("progress", tokens=self._sampled)
            self._reported, self._sampled = now, 0

    def _send_samples(self, finished: list[Any]) -> None:
        import numpy as np

        outputs = [output.outputs[0] for output in finished]
        places = [self._places.pop(output.request_id) for output in finished]
        tokens = [np.asarray(output.token_ids, dtype=np.int32) for output in outputs]
        logprobs = [np.asarray(output.logprobs.logprobs, dtype=np.float32) for output in outputs]
        self._channel.send(
            "samples",
            version=self._version,
            reasons=[output.finish_reason for output in outputs],
            arrays={
                "places": np.asarray(places, dtype=np.int64),
                "lengths": np.asarray([len(ids) for ids in tokens], dtype=np.int64),
                "tokens": np.concatenate(tokens),
                "logprobs": np.concatenate(logprobs),
            },
        )

    def _send_scores(self, finished: list[Any]) -> None:
        import numpy as np

        # A position's two: of the token that is there, and of the likeliest. The first token has none.
        pairs = [np.asarray(output.prompt_logprobs.logprobs, dtype=np.float32).reshape(-1, 2) for output in finished]
        self._channel.send(
            "scores",
            version=self._version,
            arrays={
                "places": np.asarray([self._places.pop(output.request_id) for output in finished], dtype=np.int64),
                "lengths": np.asarray([len(each) for each in pairs], dtype=np.int64),
                "logprobs": np.concatenate([each[:, 0] for each in pairs]),
                "best": np.concatenate([each[:, 1] for each in pairs]),
            },
        )

    # weights

    def _on_adopt(self, version: int) -> dict[str, Any]:
        if not self._stored:
            raise RuntimeError("asked to adopt stored weights, but it has none")
        self._version = version
        return {"kind": "done"}

    def _on_begin(self, version: int, manifest: list[dict[str, Any]]) -> dict[str, Any]:
        self._version, self._coming, self._stored = None, version, False
        if self._places:
            raise RuntimeError("a push may not begin while outputs are being sampled")
        self._rpc("start_weight_update")
        self._rpc("update_weights", {"manifest": manifest})
        return {"kind": "done"}

    def _on_connect(self, info: dict[str, Any]) -> dict[str, Any]:
        self._rpc("init_weight_transfer_engine", info)
        return {"kind": "done"}

    def _on_chunk(self, chunk: dict[str, Any]) -> dict[str, Any]:
        self._rpc("update_weights", {"chunk": chunk})
        return {"kind": "done"}

    def _on_commit(self, version: int) -> dict[str, Any]:
        if version != self._coming:
            raise RuntimeError(f"asked to commit version {version}, but {self._coming} was begun")
        self._rpc("finish_weight_update")
        if not self._engine.reset_prefix_cache():
            raise RuntimeError("the prefix cache could not be dropped")
        self._version = version
        return {"kind": "done"}

    def _on_sleep(self, level: int) -> dict[str, Any]:
        self._version = None
        self._engine.sleep(level)
        return {"kind": "done"}

    def _on_wake(self, tags: list[str]) -> dict[str, Any]:
        self._engine.wake_up(tags)
        return {"kind": "done"}

    def _rpc(self, method: str, *arguments: Any) -> None:
        self._engine.collective_rpc(method, args=arguments)


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def _die_with_parent() -> None:
    """The kernel kills this process when the thread that started it ends, however it ends. Linux."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the rank decides


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
if __name__ == "__mp_main__":  # a spawned process first imports its parent's main module
    _die_with_parent()
