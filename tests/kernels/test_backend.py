"""Which implementation is chosen, and what is said where it is not the fast one."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest
import torch

from kernels import backend
from kernels.logprob_entropy import logprob_entropy


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch):
    """Hides a module from the decision, which is otherwise made once and kept."""

    def hide(module: str, decision: Callable) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        decision.cache_clear()

    yield hide
    monkeypatch.undo()
    backend.has_native.cache_clear()
    backend.has_triton.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        backend.has_native()
        backend.has_triton()


def test_falling_back_on_a_cpu_is_said_once(without):
    without("kernels._native", backend.has_native)
    with pytest.warns(RuntimeWarning, match=r"kernels\._native cannot be loaded .*build it with: pip install"):
        assert backend.loss_path() == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logprob_entropy(torch.zeros(1, 3), torch.tensor([0]))


def test_falling_back_on_a_gpu_is_said_once(without):
    without("triton", backend.has_triton)
    with pytest.warns(RuntimeWarning, match="triton cannot be imported .*install it with: pip install triton"):
        assert backend.loss_path("cuda") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.choose("cuda", "bfloat16") == "reference"


def test_a_cpu_does_not_ask_for_triton(without):
    without("triton", backend.has_triton)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend.choose("cpu", "float32")
        assert backend.choose("cpu", "float64") == backend.choose("cuda", "float64") == "reference"


def test_a_gpu_does_not_ask_for_the_cpu_kernels(without):
    without("kernels._native", backend.has_native)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend.choose("cuda", "float32") == ("triton" if backend.has_triton() else "reference")


@pytest.mark.parametrize(
    ("device_type", "dtype", "chosen"),
    [
        ("cuda", "float32", "triton"),
        ("cuda", "bfloat16", "triton"),
        ("cuda", "float16", "triton"),
        ("cuda", "float64", "reference"),
        ("cpu", "float32", "native"),
        ("cpu", "bfloat16", "native"),
        ("cpu", "float16", "reference"),
        ("cpu", "float64", "reference"),
        ("meta", "float32", "reference"),
    ],
)
def test_what_runs_where(monkeypatch, device_type, dtype, chosen):
    monkeypatch.setattr(backend, "has_native", lambda: True)
    monkeypatch.setattr(backend, "has_triton", lambda: True)
    assert backend.choose(device_type, dtype) == chosen


@pytest.mark.parametrize("forced", ["triton", "cuda", "native", "reference"])
def test_a_forced_backend_is_taken_but_for_what_it_cannot_do(forced, monkeypatch):
    monkeypatch.setattr(backend, "COMPILED", {})  # whatever is built here
    with backend.use(forced):
        assert backend.choose("cpu", "float32") == backend.choose("cpu", "bfloat16") == backend.loss_path() == forced
        assert backend.choose("cpu", "float64") == "reference"
        assert backend.choose("cpu", "int64") == "reference"
        assert backend.choose("cpu", "float16") == ("reference" if forced == "native" else forced)


def test_forcing_nests_and_ends_with_its_block_even_in_an_error():
    outside = backend.loss_path()
    with pytest.raises(KeyError), backend.use("triton"):
        raise KeyError
    assert backend.loss_path() == outside
    with backend.use("reference"):
        with backend.use("triton"):
            assert backend.loss_path() == "triton"
        assert backend.loss_path() == "reference"
    assert backend.loss_path() == outside


@pytest.mark.parametrize("name", ["Triton", "cpu", "", "plain"])
def test_an_unknown_backend_is_refused(name):
    outside = backend.loss_path()
    with pytest.raises(ValueError, match=r"backend: .* is none of triton, cuda, native, reference"), backend.use(name):
        pass
    assert backend.loss_path() == outside


def test_what_is_not_built_cannot_be_forced(without):
    without("kernels._native", backend.has_native)
    for name in ("native", "cuda"):
        with (
            pytest.warns(RuntimeWarning) if name == "native" else contextlib.nullcontext(),
            pytest.raises(RuntimeError, match=f"backend {name}: csrc is not built for it here; build it with: pip install"),
            backend.use(name),
        ):
            pass


@pytest.mark.skipif(not backend.has_native(), reason="kernels._native is not built")
def test_a_forced_backend_is_loaded():
    """Nothing else need have asked for it in this process before."""
    asked = (
        "import torch\n"
        "from kernels import backend\n"
        "from kernels.logprob_entropy import logprob_entropy\n"
        "with backend.use('native'):\n"
        "    print(logprob_entropy(torch.zeros(1, 4), torch.tensor([0]))[1].exp().item())\n"
    )
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(4.0)
