"""Peak memory of one call, beyond what was there before it.

CUDA: torch's allocator counts every byte (max_memory_allocated, reset before the call), cuBLAS's workspace included.

CPU: the process's own peak resident set (VmHWM), which the kernel is told to forget just before the call (/proc/self/clear_refs).
torch's profiler would count torch's tensors alone and miss what native code allocates for itself. It is read in a process of its
own, because blocks that an earlier contender freed stay in the heap and would hide what the next one takes; for the same reason
glibc gives back every block there (MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_). A call on a tiny input comes first, so that
libraries and threads are there already; it is too small to leave behind buffers that the real call could reuse.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.kernels.cases import Case
from benchmarks.kernels.contender import Contender, Outputs, Prepared
from benchmarks.kernels.inputs import Inputs, make_inputs

TIMEOUT = 240


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. extra: peak beyond the inputs; returned: of it, what the call gave back (gradients and per-token outputs)."""

    extra: int
    returned: int

    @property
    def beyond_returned(self) -> int:
        return max(0, self.extra - self.returned)


def measure_cuda(prepared: Prepared, inputs: Inputs) -> Memory:
    if prepared.before is not None:
        prepared.before()
    device = inputs.device
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    outputs = prepared.run()
    torch.cuda.synchronize(device)
    return Memory(torch.cuda.max_memory_allocated(device) - before, returned_bytes(outputs, known_storages(inputs, prepared)))


def known_storages(inputs: Inputs, prepared: Prepared) -> set[int]:
    """What was there before the call: a gradient that lies in them is none of the memory that it took."""
    return {tensor.untyped_storage().data_ptr() for tensor in (*inputs.leaves, *prepared.buffers)}


def returned_bytes(outputs: Outputs, known: set[int]) -> int:
    """Bytes of the outputs' storages, each once, without those that were there before."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in outputs.tensors()}
    return sum(size for address, size in storages.items() if address not in known)


def measure_cpu(cases: list[tuple[Case, str]]) -> list[Memory | str]:
    """Each (case, contender's name) in turn, all in one fresh process; a reason in words where one could not be measured."""
    if not Path("/proc/self/clear_refs").exists():
        return ["no /proc/self/clear_refs on this system"] * len(cases)
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "OMP_WAIT_POLICY": "PASSIVE"}
    wanted = json.dumps([[asdict(case), name] for case, name in cases])
    command = [sys.executable, "-m", "benchmarks.kernels.memory", wanted]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired as expired:
        text = expired.stdout or b""
        return _read(text if isinstance(text, str) else text.decode(), len(cases), f"not done within {TIMEOUT} s")
    return _read(done.stdout, len(cases), (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])


def _read(text: str, count: int, otherwise: str) -> list[Memory | str]:
    found: list[Memory | str] = []
    for line in text.splitlines():
        if line.startswith("{"):
            answer = json.loads(line)
            found.append(answer["reason"] if "reason" in answer else Memory(answer["extra"], answer["returned"]))
    return found + [otherwise] * (count - len(found))


def resident_bytes(field: str) -> int:
    """A field of /proc/self/status: VmHWM is the peak, VmRSS what is resident now."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status: no field {field}")


def peak_of(run: Callable[[], Outputs], known: set[int]) -> Memory:
    """One call in this process. Its outputs are alive at the end, so that what it returns is part of the peak."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident_bytes("VmRSS")
    outputs = run()
    return Memory(max(0, resident_bytes("VmHWM") - before), returned_bytes(outputs, known))


def _child(case: Case, contender: Contender) -> Memory:
    device = torch.device("cpu")
    tiny = replace(case, tokens=2, vocabulary=min(case.vocabulary, 64), hidden=min(case.hidden, 16))
    _run_once(contender, tiny, make_inputs(tiny, device))
    inputs = make_inputs(case, device)
    prepared = contender.prepare(case, inputs)
    if contender.name == "torch.compile":
        prepared.run()  # what compiling takes is not what calling takes
    if prepared.before is not None:
        prepared.before()
    return peak_of(prepared.run, known_storages(inputs, prepared))


def _run_once(contender: Contender, case: Case, inputs: Inputs) -> list[Tensor]:
    return contender.prepare(case, inputs).run().tensors()


def main(argument: str) -> None:
    from benchmarks.kernels.registry import by_name

    for fields, name in json.loads(argument):
        try:
            answer: dict[str, object] = asdict(_child(Case(**fields), by_name(name, torch.device("cpu"))))
        except Exception as error:  # the reason is the answer; what follows can still be measured
            answer = {"reason": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
