"""The choice of implementations: automatic, explicit, strict, forced; and what is read from the environment."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import deltakern
from deltakern import backend, launch, ops

ROOT = Path(__file__).parents[1]


def _fake(name: str, reason: str | None):
    """An op whose CPU kernel refuses for ``reason``."""

    def reference(x):
        return x + 1

    def facts(x, **_):
        return backend.Facts(x.device.type, (x.dtype,))

    def function(x, *, impl="auto"):
        return backend.call(function, impl, x)

    function.__name__ = name
    return backend.op(
        reference=reference, check=lambda x: None, facts=facts, run=lambda chosen, x: x + 2, kernels={"cpp": lambda _: reason}
    )(function)


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr(backend, "_OPS", dict(backend._OPS))
    monkeypatch.setattr(backend, "_warned", set())
    for name in ("DELTAKERN_STRICT", "DELTAKERN_IMPL"):
        monkeypatch.delenv(name, raising=False)
    launch.forget_plans()
    yield
    launch.forget_plans()


def test_auto_takes_the_kernel():
    op = _fake("present", None)
    assert op(torch.zeros(1)) == 2
    found = deltakern.explain(op, torch.zeros(1))
    assert (found.chosen, found.refused) == ("cpp", {"reference": "a kernel is present"})


def test_auto_falls_back_and_warns_once_with_the_reason():
    op = _fake("missing", "no compiler was found")
    with pytest.warns(backend.BackendWarning, match=r"deltakern.missing: the PyTorch reference runs.*no compiler was found"):
        assert op(torch.zeros(1)) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op(torch.zeros(1)) == 1
    assert "not cpp: no compiler was found" in str(deltakern.explain(op, torch.zeros(1)))


def test_strict_raises_instead(monkeypatch):
    op = _fake("strict", "no compiler was found")
    monkeypatch.setenv("DELTAKERN_STRICT", "1")
    with pytest.raises(deltakern.BackendError, match=r"DELTAKERN_STRICT=1.*no compiler was found"):
        op(torch.zeros(1))
    assert op(torch.zeros(1), impl="reference") == 1


def test_float64_asks_for_the_reference(monkeypatch):
    """No warning and no strict error where the first tensor is float64; where another one is, a kernel is missed."""
    monkeypatch.setenv("DELTAKERN_STRICT", "1")
    op = _fake("double", "the kernel takes float32, got float64")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op(torch.zeros(1, dtype=torch.float64)) == 1
    found = deltakern.explain(op, torch.zeros(1, dtype=torch.float64))
    assert (found.chosen, found.why) == ("reference", "float64 is the reference's")
    assert found.refused == {"cpp": "the kernel takes float32, got float64"}
    with pytest.raises(deltakern.BackendError, match="impl='cpp' cannot run: the kernel takes float32, got float64"):
        op(torch.zeros(1, dtype=torch.float64), impl="cpp")
    candidates = torch.randn(2, 5, 8)
    with pytest.raises(deltakern.BackendError, match="DELTAKERN_STRICT=1"):
        ops.best_of_n(candidates, torch.randn(2, 8, dtype=torch.float64))


def test_explicit_never_falls_back():
    op = _fake("explicit", "no compiler was found")
    with pytest.raises(deltakern.BackendError, match="impl='cpp' cannot run: no compiler was found"):
        op(torch.zeros(1), impl="cpp")
    with pytest.raises(deltakern.BackendError, match="has no implementation 'triton'"):
        op(torch.zeros(1), impl="triton")
    with pytest.raises(ValueError, match=r"impl is 'auto' or one of .* got 'fastest'"):
        op(torch.zeros(1), impl="fastest")


def test_forcing_by_context_and_by_environment(monkeypatch):
    op = _fake("forced", None)
    with deltakern.use_impl("reference"):
        assert op(torch.zeros(1)) == 1
    assert op(torch.zeros(1)) == 2
    monkeypatch.setenv("DELTAKERN_IMPL", "reference")
    assert op(torch.zeros(1)) == 1
    with deltakern.use_impl("cpp"):
        assert op(torch.zeros(1)) == 2
    monkeypatch.setenv("DELTAKERN_IMPL", "fastest")
    with pytest.raises(deltakern.BackendError, match="DELTAKERN_IMPL"):
        op(torch.zeros(1))
    with pytest.raises(ValueError, match="use_impl"), deltakern.use_impl("fastest"):
        pass


def test_explain_wants_an_op():
    with pytest.raises(TypeError, match=r"expected one of deltakern.ops"):
        deltakern.explain(torch.add, torch.zeros(1))


def test_every_op_is_registered_with_reference_and_contract():
    assert set(ops.__all__) - {"BestOfN"} <= set(backend.ops())
    for name, entry in backend.ops().items():
        assert entry.function.reference is entry.reference, name
        module = sys.modules[entry.function.__module__]
        for heading in ("Formula", "Shapes", "Dtypes", "Gradient", "Source"):
            assert re.search(heading, module.__doc__), f"{name}: the contract in its module's docstring lacks {heading!r}"


def test_import_is_light():
    """Importing the package, its models too, loads neither Triton nor the extension nor anything optional, and no CUDA."""
    code = (
        "import sys, deltakern, torch\n"
        "heavy = {'triton','deltakern._C','av','matplotlib','rich','typer','PIL','fvcore','transformers','flash_attn','huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)), torch.cuda.is_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "[] False"


def test_environment_variables_are_read_and_documented():
    """Every name in the table is read somewhere and stands in the README; no other DELTAKERN_ name is used."""
    sources = [p for p in [ROOT / "setup.py", *(ROOT / "deltakern").rglob("*.py")] if p.exists()]
    used = {name for p in sources for name in re.findall(r"environ[^\n]*?\"(DELTAKERN_\w+)\"", p.read_text())}
    assert used == set(backend.ENVIRONMENT)
    mentioned = {name for p in [*sources, ROOT / "README.md"] for name in re.findall(r"\bDELTAKERN_[A-Z_]+\b", p.read_text())}
    assert mentioned - {"DELTAKERN_WITH_CUDA"} == set(backend.ENVIRONMENT)
    assert all(name in (ROOT / "README.md").read_text() for name in backend.ENVIRONMENT)
