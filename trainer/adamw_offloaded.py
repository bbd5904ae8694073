"""AdamW whose moments wait in the host's memory and pass through the GPU one weight at a time.

Per weight i of a step, on three streams and two slots of memory that take turns:

    fetch      wait until slot i mod 2 is stored (weight i - 2); host → slot; event fetched
    compute    wait for fetched; AdamW on weight, gradient and slot; event updated
    store      wait for updated; slot → host; event stored

so that weight i + 1 comes up while i goes down. The slots' memory is the compute stream's, which may still use it for what was
there before: fetch waits for that stream before its first copy. At the end of a step the host waits for all of them: the slots
are then given back, and a checkpoint may read the host's copies. A CPU has one stream, and the same code runs on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from trainer.adamw8bit import local
from trainer.host_memory import HostMemory

MOMENTS = ("exp_avg", "exp_avg_sq")


class OffloadedAdamW(torch.optim.AdamW):
    """Same results as its base, bit for bit. Its moments exist from the start, in the host's memory alone."""

    def __init__(self, parameters: Iterable[nn.Parameter], **settings: Any) -> None:
        super().__init__(parameters, **settings)
        every = [(parameter, group) for group in self.param_groups for parameter in group["params"]]
        host = HostMemory(pinned=every[0][0].is_cuda)
        for parameter, group in every:
            state = self.state[parameter]
            state["step"] = torch.zeros((), device=parameter.device if group["fused"] else None)
            for name in MOMENTS:
                moment = host.zeros(local(parameter.detach()).shape)
                state[name] = DTensor(moment, parameter._spec, requires_grad=False) if isinstance(parameter, DTensor) else moment
        self._streams = torch.get_device_module(every[0][0].device)
        self._fetch, self._store = self._streams.Stream(), self._streams.Stream()

    @torch.no_grad()
    def step(self) -> None:
        work = [(group, parameter) for group in self.param_groups for parameter in group["params"] if parameter.grad is not None]
        if not work:
            return
        streams, fetch, store = self._streams, self._fetch, self._store
        compute = streams.current_stream()
        largest = max(local(parameter).numel() for _, parameter in work)
        device = local(work[0][1]).device
        slots = [torch.empty(len(MOMENTS), largest, device=device) for _ in range(2)]
        stored: list[Any] = [None, None]
        fetch.wait_stream(compute)

        def bring(index: int) -> Any:
            with streams.stream(fetch):
                if stored[index % 2] is not None:
                    fetch.wait_event(stored[index % 2])
                for host, moment in self._moments(work[index][1], slots[index % 2]):
                    moment.copy_(host, non_blocking=True)
                return fetch.record_event()

        fetched = bring(0)
        for index, (group, parameter) in enumerate(work):
            here = fetched
            if index + 1 < len(work):
                fetched = bring(index + 1)
            compute.wait_event(here)
            moments = self._moments(parameter, slots[index % 2])
            self._adamw(group, parameter, *(moment for _, moment in moments))
            updated = compute.record_event()
            with streams.stream(store):
                store.wait_event(updated)
                for host, moment in moments:
                    host.copy_(moment, non_blocking=True)
                stored[index % 2] = store.record_event()
        streams.synchronize()

    def _moments(self, parameter: nn.Parameter, slot: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(the host's copy, its place in a slot) of each moment, this rank's rows."""
        hosts = [local(self.state[parameter][name]) for name in MOMENTS]
        return [(host, place[: host.numel()].view_as(host)) for host, place in zip(hosts, slot, strict=True)]

    def _adamw(self, group: dict[str, Any], parameter: nn.Parameter, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        beta1, beta2 = group["betas"]
        adamw(
            [local(parameter)], [local(parameter.grad)], [exp_avg], [exp_avg_sq], [], [self.state[parameter]["step"]],
            foreach=False, fused=group["fused"], amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip
