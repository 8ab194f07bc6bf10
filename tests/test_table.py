"""choice/table.py: what follows from measurements: the class that is looked up, the implementation that is chosen, and the kind of machine."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from measurements import a_machine, choose, entry, hold, needs_native  # noqa: F401  (a fixture)
from torch import Tensor

from fastlora import operators, ops
from fastlora.choice import table
from fastlora.choice.table import Measurement


@pytest.mark.parametrize(
    ("rows", "elements", "expected"),
    [
        (0, 1, (1, "small")),
        (1, 2**21 - 1, (1, "small")),
        (3, 2**21, (1, "large")),
        (4, 2**30, (8, "large")),
        (31, 1, (8, "small")),
        (32, 1, (64, "small")),
        (255, 1, (64, "small")),
        (256, 1, (512, "small")),
        (2048, 1, (4096, "small")),
        (10**9, 1, (4096, "small")),
    ],
)
def test_classes(rows: int, elements: int, expected: tuple[int, str]) -> None:
    assert table.class_of(rows, elements) == expected


@needs_native
@pytest.mark.parametrize(
    ("ratio", "expected"), [(0.5, "cpu"), (0.98, "cpu"), (0.981, "reference"), (1.0, "reference"), (7.0, "reference")]
)
def test_only_what_is_faster_by_a_margin_is_chosen(
    ratio: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "forced", None)
    hold(entry(ratio))
    assert choose() == expected
    reason = operators.lora_linear.choose(torch.ones(64, 4), torch.ones(4, 4)).reason
    ran = f"native C++, {ratio:.2f}x of plain PyTorch's time (measured by a test)"
    not_run = f"plain PyTorch, since native C++ would take {ratio:.2f}x of its time (measured by a test)"
    assert reason == (ran if expected == "cpu" else not_run)


@needs_native
def test_the_nearest_class_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "forced", None)
    hold(
        entry(2.0, rows=1),
        entry(0.5, rows=64),
        entry(2.0, rows=64, size="large"),
        entry(0.5, rows=64, dropout=True),
        entry(2.0, op="lora_linear_backward"),
    )
    assert [choose(rows) for rows in (1, 3, 64, 512, 100_000)] == ["reference", "reference", "cpu", "cpu", "cpu"]
    assert choose(64, elements=2**24) == "reference"
    assert choose(1, dropout=True) == "cpu"  # dropout counts for more than rows
    assert choose(64, elements=2**24, dropout=True) == "cpu"
    assert choose(backward=True) == "reference"  # forward and backward are chosen separately
    assert choose(1, dtype=torch.bfloat16) == "cpu"  # nothing is known: the default


@needs_native
def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    hold(entry(2.0))
    monkeypatch.setattr(ops, "forced", None)
    assert choose() == "reference"
    monkeypatch.setattr(ops, "forced", "cpu")
    assert choose() == "cpu"
    hold(entry(0.5))
    monkeypatch.setattr(ops, "forced", "reference")
    assert choose() == "reference"


@needs_native
def test_what_failed_its_check_once_is_refused_in_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "forced", None)
    hold(entry(None, rows=512), *(entry(0.1, rows=rows) for rows in (1, 8, 64)), entry(0.1, dtype="bfloat16"))
    assert {choose(rows) for rows in (1, 8, 64, 512)} == {"reference"}
    assert choose(dtype=torch.bfloat16) == "cpu"
    assert "native C++ failed its check" in operators.lora_linear.choose(torch.ones(1, 1), torch.ones(1, 1)).reason


def test_the_fastest_of_several_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule is the same for a card, which this machine need not have."""
    ops.availability()  # what is loaded at its first use is registered before the table is a copy
    names = {("lora_linear", name): max for name in ("triton", "cuda")}
    monkeypatch.setattr(ops, "forced", None)
    monkeypatch.setattr(ops, "implementations", ops.implementations | names)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def decide(*entries: Measurement) -> str:
        hold(*entries, device_type="cuda")
        return ops._decide("lora_linear", torch.device("cuda"), torch.bfloat16, 64, 2**20, False).implementation

    triton, cuda = (
        entry(ratio, dtype="bfloat16", implementation=name) for ratio, name in ((0.7, "triton"), (0.6, "cuda"))
    )
    assert decide() == "cuda"  # a card of this generation has run it; nothing was measured on this kind
    assert decide(triton) == "triton"
    assert decide(triton, cuda) == "cuda"
    assert decide(triton, cuda._replace(checked=False, ratio=None)) == "triton"
    assert decide(triton._replace(ratio=1.5), cuda._replace(ratio=1.2)) == "reference"
    # CUDA C++ is for tensor cores: 16 bits, and not before the oldest card that it is compiled for.
    assert ops.candidates("lora_linear", torch.device("cuda"), torch.float32) == ["triton"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert ops.candidates("lora_linear", torch.device("cuda"), torch.bfloat16) == ["triton"]
    assert decide(triton, cuda) == "triton"
    assert decide() == "reference"


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("op", ["lora_linear", "multi_lora_backward", "prefix_concat"])
def test_what_runs_unmeasured_on_a_gpu(
    op: str, dtype: torch.dtype, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    ops.availability()
    monkeypatch.setattr(ops, "forced", None)
    monkeypatch.setattr(ops, "implementations", ops.implementations | {(op, "cuda"): max})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    hold(device_type="cuda")
    found = ops._decide(op, torch.device("cuda"), dtype, 64, 2**20, False)
    checked = capability == (9, 0) and dtype is torch.bfloat16 and op != "prefix_concat"
    assert found.implementation == ("cuda" if checked else "reference")
    assert "not measured on this kind of GPU" in found.reason


@pytest.mark.parametrize(
    ("alone", "together", "runs"),
    [
        (0.6, ("triton", 0.5), "together"),
        (0.6, ("triton", 0.7), "each"),  # what runs them one by one gains more
        (0.6, ("triton", 0.6), "each"),  # or as much
        (1.5, ("triton", 0.9), "together"),
        (1.5, ("triton", 1.5), "each"),
        (0.6, ("cuda", 0.7), "together"),  # the same implementation: a group saves passes over x
    ],
)
def test_layers_that_share_x_run_as_gains_most(
    alone: float, together: tuple[str, float], runs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one(x: Tensor, weight: list[Tensor], *_: Any) -> tuple[list[Tensor], Tensor, Tensor]:
        ran.append("each")
        return [x @ weight[0].T], x[None, :, :2], x.new_empty(0)

    def group(x: Tensor, weight: list[Tensor], *_: Any) -> tuple[list[Tensor], Tensor, Tensor]:
        ran.append("together")
        return [], x, x

    def on_a_card(op: str, like: Tensor, rows: int, elements: int, dropout: bool, _: Tensor) -> ops.Choice:
        return ops._decide(op, torch.device("cuda"), like.dtype, rows, elements, dropout)

    ran: list[str] = []
    ops.availability()
    ours = {("lora_linear", name): one for name in ("reference", "cuda")}
    ours |= {("lora_linear_shared", name): group for name in ("triton", "cuda")}
    monkeypatch.setattr(ops, "forced", None)
    monkeypatch.setattr(ops, "implementations", ops.implementations | ours)
    monkeypatch.setattr(ops, "choose", on_a_card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    name, ratio = together
    hold(
        entry(alone, dtype="bfloat16", implementation="cuda"),
        entry(ratio, "lora_linear_shared", dtype="bfloat16", implementation=name),
        device_type="cuda",
    )
    x, weight = (torch.ones(64, 8, dtype=torch.bfloat16) for _ in range(2))
    rest = [weight[:2]] * 2, [weight[:, :2]] * 2, [1.0] * 2, [0.0] * 2, None, None, None
    torch.ops.fastlora.lora_linear(x, [weight] * 2, [x.new_empty(0)] * 2, *rest)
    assert set(ran) == {runs}


@needs_native
def test_choices_change_with_the_measurements(machine: Path) -> None:
    assert choose() == "cpu"
    table.keep("cpu", [entry(2.0)], "a test")
    assert choose() == "reference"
    table.load_state({})
    assert choose() == "cpu"


CPUS = {
    "amd-zen4-avx512bf16": ("AuthenticAMD", "25", "17", "avx512f avx512_bf16", "AVX512"),
    "amd-zen4-avx2": ("AuthenticAMD", "25", "17", "avx512f avx512_bf16", "AVX2"),
    "amd-zen3-avx2": ("AuthenticAMD", "25", "33", "avx2", "AVX2"),
    "amd-zen5-avx512bf16": ("AuthenticAMD", "26", "2", "avx512_bf16", "AVX512"),
    "intel-6-143-amx": ("GenuineIntel", "6", "143", "avx512_bf16 amx_bf16", "AVX512"),
    "intel-6-85-avx512": ("GenuineIntel", "6", "85", "avx512f", "AVX512"),
    "centaurhauls-7-91-avx2": ("CentaurHauls", "7", "91", "avx2", "AVX2"),
}


@pytest.mark.parametrize("kind", CPUS)
def test_kinds_of_x86(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vendor, family, model, flags, capability = CPUS[kind]
    if kind == "amd-zen4-avx2":  # an emulated CPU beside its host's /proc: Zen 3 and 4 differ by what they can do
        kind = "amd-zen3-avx2"
    facts = {"vendor_id": vendor, "cpu family": family, "model": model, "flags": flags}
    monkeypatch.setattr(table, "cpu_facts", lambda: facts)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert table.kind_of("cpu") == kind


@pytest.mark.parametrize(
    ("facts", "kind"),
    [
        ({"CPU implementer": "0x41", "CPU part": "0xd40"}, "linux-aarch64-0x41-0xd40-default"),
        ({}, "linux-aarch64-default"),
    ],
)
def test_kinds_of_other_machines(facts: dict[str, str], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "cpu_facts", lambda: facts)
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert table.kind_of("cpu") == kind


def test_facts_end_with_the_first_processor() -> None:
    lines = io.StringIO("processor\t: 0\nmodel name\t: A: B\n\nprocessor\t: 1\n")
    assert dict(table._facts(lines)) == {"processor": "0", "model name": "A: B"}
