"""What every test runs under: fixed seeds, uninitialised memory full of NaN, and one run an implementation and device.

SEED in the environment is another seed than 0: what then fails rests on luck.

A test that takes `device` runs on the CPU, and on the GPU where there is one. A test that also takes `implementation` runs once for each
implementation of its module's OPERATOR that can run there, or for the module's RUNS, forced for everything in fastlora.functional. Without a
GPU the Triton kernels run in Triton's interpreter. Where nothing is forced, choices do not depend on what was measured on this machine.
"""

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

# Before torch starts: repeatable products on a GPU.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Also in the processes that tests start: nothing is known of any machine, and the user's cache stays as it is.
os.environ["FASTLORA_TABLE"] = os.path.join(os.path.dirname(__file__), "nothing_measured.json")

import amx_fault
import pytest
import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    # Before any kernel is defined: triton.jit looks once.
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.install()

from fastlora import ops
from fastlora.choice import table
from fastlora.frozen import packed, products

amx_fault.install_if_asked()
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)


def implementations(operator: str, device: str) -> list[str]:
    """The names of the implementations of `operator` that run on `device`, in every dtype: the others have tests of their own."""
    elsewhere = {"cpu": ["cuda"], "cuda": ["cpu"]}[device]
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        elsewhere.append("triton")
    names = []
    for name in ops.IMPLEMENTATIONS:
        try:
            ops.implementation(operator, name)
        except ops.ImplementationError:
            continue
        if name not in elsewhere and (operator, name) not in ops.SIXTEEN_BITS:
            names.append(name)
    return names


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "implementation" in metafunc.fixturenames:
        module = metafunc.module
        runs = getattr(module, "RUNS", None) or [
            (device, name) for device in DEVICES for name in implementations(module.OPERATOR, device)
        ]
        metafunc.parametrize(
            ("device", "implementation"), runs, ids=["-".join(run) for run in runs], indirect=["implementation"]
        )
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES)


@pytest.fixture
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(ops, "forced", request.param)
    return request.param


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(int(os.environ.get("SEED", "0")))


@pytest.fixture(autouse=True)
def unmeasured() -> None:
    """What an earlier test made known is forgotten."""
    table.load_state(None)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Under deterministic algorithms torch fills every uninitialised tensor with NaN (integers: the largest), in Python and in C++ alike."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every frozen product is oneDNN's on a packed copy, where it can be; returns the bytes of the copies at each product."""
    if packed._fingerprint is None or not torch.backends.mkldnn.is_available():
        pytest.skip("weights have copies only where torch has oneDNN and the extension is built")
    held: list[int] = []
    onednn = products._linear_pointwise

    def multiply(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        held.append(sum(one.bytes for one in packed._by_key.values()) * weight.is_mkldnn)
        return onednn(x, weight, *rest)

    monkeypatch.setattr(packed, "packs", lambda dtype: dtype is torch.float32)
    monkeypatch.setattr(products, "_few_rows", None)  # with an adapter it has no copies
    monkeypatch.setattr(products, "_linear_pointwise", multiply)
    monkeypatch.setattr(table, "forced_way", "packed")
    return held
