"""ops.py: which implementations there are, which one runs, and that none replaces another in silence."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import make_layer
from conftest import implementations
from typer.testing import CliRunner

from fastlora import operators, ops
from fastlora.choice import table
from fastlora.cli import app
from fastlora.functional import lora_linear

CHOOSERS = {
    "lora_linear": lambda x: operators.lora_linear.choose(x, x),
    "frozen_linear": lambda x: operators.frozen_linear.choose(x, x),
    "multi_lora": lambda x: operators.lora_linear.choose(x, x, mixed=True),
    "prefix_concat": lambda x: operators.prefix_concat.choose(x, len(x)),
}
CALL = """
import torch, fastlora
from fastlora import functional, operators, ops
x, weight, a, b = torch.ones(2, 4), torch.ones(3, 4), torch.ones(1, 4), torch.ones(3, 1)
print(functional.lora_linear(x, weight, None, a, b, 2.0).tolist(), operators.lora_linear.choose(x, weight))
"""


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, without this one's interpreter for Triton."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FASTLORA_IMPL")}
    inherited["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, check=False, env=inherited | environment, capture_output=True, text=True, timeout=120
    )


def test_uninitialised_memory_is_poisoned() -> None:
    """What conftest promises to every test: memory that nobody wrote shows."""
    for tensor in (torch.empty(3), torch.ones(2).new_empty(3), torch.empty_like(torch.ones(3).bfloat16())):
        assert tensor.isnan().all()


def test_every_implementation_has_every_operator(device: str) -> None:
    """But for CUDA C++, which has only some, and for frozen_linear, which is torch's own product where it is not packed.py's."""
    names = set(implementations("lora_linear", device)) - {"cuda"}
    assert "reference" in names
    for op in ("lora_linear", "multi_lora", "prefix_concat"):
        assert implementations(op, device) == implementations(f"{op}_backward", device), op
        assert set(implementations(op, device)) - {"cuda"} == names, op
    ours = ["reference", "cpu"] if device == "cpu" else ["reference"]
    assert implementations("frozen_linear", device) == implementations("frozen_linear_backward", device) == ours


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_frozen_linear_is_torchs_beside_other_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "forced", name)
    assert operators.frozen_linear.choose(torch.ones(2, 2), torch.ones(2, 2))[:2] == ("reference", "FASTLORA_IMPL")


def test_backward_and_forward_are_chosen_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """One forced name reaches every operator: each is entered in the table's place under it."""
    called = []
    table = dict(ops.implementations)
    for op in ops.SCHEMAS:
        table[op, "reference"] = lambda *args, op=op: called.append(op) or getattr(ops.reference, op)(*args)
    monkeypatch.setattr(ops, "implementations", table)
    monkeypatch.setattr(ops, "forced", "reference")
    layer = make_layer(3, 4, 5, 2)
    lora_linear(*layer[:5], 1.0).sum().backward()
    assert called == ["lora_linear", "lora_linear_backward"]


@pytest.mark.parametrize("op", CHOOSERS)
def test_choice_on_a_cpu(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unmeasured: the native extension where it is built and computes in the dtype, else the reference, with the reason."""
    monkeypatch.setattr(ops, "forced", None)
    monkeypatch.setattr(table, "choices", {})
    monkeypatch.setattr(table, "_tables", {"cpu": {}})
    native = "cpu" in implementations(op, "cpu")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert CHOOSERS[op](torch.ones(2, 2, dtype=dtype)).implementation == ("cpu" if native else "reference")
    choice = CHOOSERS[op](torch.ones(2, 2, dtype=torch.float64))
    assert choice.implementation == "reference" and choice.reason
    monkeypatch.setattr(
        ops, "implementations", {key: value for key, value in ops.implementations.items() if key[1] == "reference"}
    )
    monkeypatch.setattr(ops, "_missing", {"cpu": "not built (no compiler)"})
    table.choices.clear()
    choice = CHOOSERS[op](torch.ones(2, 2))
    assert choice.implementation == "reference" and "no compiler" in choice.reason


@pytest.mark.parametrize("op", CHOOSERS)
def test_forced_choice(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in implementations(op, "cpu"):
        monkeypatch.setattr(ops, "forced", name)
        assert CHOOSERS[op](torch.ones(2, 2))[:2] == (name, "FASTLORA_IMPL")


@pytest.mark.parametrize("name", [name for name in implementations("lora_linear", "cpu") if name != "reference"])
def test_forced_and_unable_raises(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float64 is for the reference: a forced implementation says so and does not hand over."""
    monkeypatch.setattr(ops, "forced", name)
    with pytest.raises(ops.ImplementationError, match="float64"):
        lora_linear(*make_layer(3, 4, 5, 2, torch.float64)[:5], 1.0)


def test_an_implementation_of_some_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has runs; what it lacks is plain PyTorch's, or an error where the implementation is forced."""
    table = {key: value for key, value in ops.implementations.items() if key[1] == "reference"}
    monkeypatch.setattr(ops, "implementations", {**table, ("prefix_concat", "cuda"): max})
    monkeypatch.setattr(ops, "_loaders", {})
    monkeypatch.setattr(ops, "_notes", {"cuda": "; a note"})
    monkeypatch.setattr(ops, "_missing", {})
    monkeypatch.setenv(ops.EMULATORS["cuda"], "1")
    found = {entry.implementation: entry for entry in ops.availability()}
    assert found["cuda"] == ("cuda", True, "prefix_concat; a note")
    monkeypatch.setattr(ops, "forced", "cuda")
    assert CHOOSERS["prefix_concat"](torch.ones(2, 2)).implementation == "cuda"
    with pytest.raises(ops.ImplementationError, match="cuda has no lora_linear"):
        CHOOSERS["lora_linear"](torch.ones(2, 2))
    with pytest.raises(ops.ImplementationError, match="cuda has no prefix_concat_backward"):
        ops.implementation("prefix_concat_backward", "cuda")


@pytest.mark.parametrize(("capability", "found"), [((7, 5), []), ((8, 0), ["cuda"]), ((12, 0), ["cuda"])])
def test_cards_that_cuda_is_compiled_for(
    capability: tuple[int, int], found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "implementations", {("prefix_concat", "cuda"): max})
    monkeypatch.setattr(ops, "_loaders", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert ops.candidates("prefix_concat", torch.device("cuda"), torch.float32) == found
    assert ops.candidates("lora_linear", torch.device("cuda"), torch.float32) == []


def test_unknown_names() -> None:
    with pytest.raises(ops.ImplementationError, match="nonsense.*expected one of reference, cpu, triton, cuda"):
        ops.implementation("lora_linear", "nonsense")
    with pytest.raises(ops.ImplementationError, match="nonsense"):
        ops.implementation("nonsense", "reference")


def test_availability() -> None:
    found = ops.availability()
    assert [entry.implementation for entry in found] == list(ops.IMPLEMENTATIONS)
    assert found[0].present
    for entry in found:
        assert entry.reason
        assert entry.present or "without it" in entry.reason  # what its absence costs


def empty_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("implementations", "_missing", "_loaders"):
        monkeypatch.setattr(ops, name, {})


def test_late_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader runs once, when the name is first asked for."""
    empty_tables(monkeypatch)
    calls = []

    def load() -> None:
        calls.append(1)
        ops.implement("lora_linear", "triton", max)

    ops.implement_later("triton", load)
    assert not calls
    assert ops.implementation("lora_linear", "triton") is ops.implementation("lora_linear", "triton") is max
    assert calls == [1]


def test_two_threads_that_load_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second to come finds the loader gone."""
    empty_tables(monkeypatch)

    def load() -> None:
        ops.implement("lora_linear", "triton", max)
        if ops._loaders:  # the other thread, while this one loads
            ops._loaders.clear()

    ops.implement_later("triton", load)
    assert ops.implementation("lora_linear", "triton") is max


def test_late_loading_of_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    empty_tables(monkeypatch)

    def load() -> None:
        raise ImportError("No module named 'triton'")

    ops.implement_later("triton", load)
    for _ in range(2):
        with pytest.raises(ops.ImplementationError, match="No module named 'triton'"):
            ops.implementation("lora_linear", "triton")


def test_late_loading_that_breaks_says_so_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect in an implementation is no missing implementation, not even the second time."""
    empty_tables(monkeypatch)

    def load() -> None:
        raise AttributeError("a defect")

    ops.implement_later("triton", load)
    for _ in range(2):
        with pytest.raises(AttributeError, match="a defect"):
            ops.implementation("lora_linear", "triton")


def test_environment_forces() -> None:
    done = python(CALL, FASTLORA_IMPL="reference")
    assert "[[12.0, 12.0, 12.0], [12.0, 12.0, 12.0]]" in done.stdout and "'FASTLORA_IMPL'" in done.stdout, done.stderr


@pytest.mark.parametrize("setting", [{}, {"FASTLORA_IMPL": ""}], ids=["unset", "empty"])
def test_environment_without_a_name_forces_nothing(setting: dict[str, Any]) -> None:
    done = python(CALL, **setting)
    assert "[[12.0, 12.0, 12.0], [12.0, 12.0, 12.0]]" in done.stdout and "'FASTLORA_IMPL'" not in done.stdout, (
        done.stderr
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nonsense", "FASTLORA_IMPL='nonsense': expected one of reference, cpu, triton, cuda"),
        ("cuda", "cuda"),
        ("triton", "triton"),
    ],
)
def test_environment_that_cannot_be_followed_raises(name: str, message: str) -> None:
    done = python("import fastlora\nprint('imported')\n" + CALL, FASTLORA_IMPL=name)
    assert done.returncode != 0 and done.stdout == "imported\n"
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("fastlora.ops.ImplementationError: ") and message in last


def test_a_nonsense_variable_is_no_obstacle_to_what_needs_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "forced", "nonsense")
    done = CliRunner().invoke(app, ["env"])
    assert done.exit_code == 0 and "plain PyTorch" in done.output


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_a_card_that_is_missing_is_told_before_anything_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that the implementation is not built, nor that it does not compute in float32: neither would help."""
    monkeypatch.delenv(ops.EMULATORS[name], raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ops, "forced", name)
    expected = f"FASTLORA_IMPL={name}: lora_linear cannot run: {name} does not run on cpu devices: torch sees no CUDA card here"
    with pytest.raises(ops.ImplementationError, match=f"^{expected}$"):
        lora_linear(*make_layer(3, 4, 5, 2)[:5], 1.0)
    with pytest.raises(ops.ImplementationError, match=f"^FASTLORA_IMPL={name}: .*no CUDA card here$"):
        ops.read_environment()


def test_a_variable_that_changes_is_followed_when_it_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_environment", None)
    monkeypatch.setattr(ops, "forced", "reference")  # by a program, not by the environment
    monkeypatch.delenv("FASTLORA_IMPL", raising=False)
    ops.read_environment()
    assert ops.forced == "reference"
    monkeypatch.setenv("FASTLORA_IMPL", "nonsense")
    with pytest.raises(ops.ImplementationError, match="FASTLORA_IMPL='nonsense': expected one of reference, cpu"):
        ops.read_environment()
    monkeypatch.setenv("FASTLORA_IMPL", "reference")
    ops.read_environment()
    assert CHOOSERS["frozen_linear"](torch.ones(2, 2))[:2] == ("reference", "FASTLORA_IMPL")
    monkeypatch.setenv("FASTLORA_IMPL", "")
    ops.read_environment()
    assert ops.forced is None


def test_a_forced_implementation_that_is_not_built_is_told_when_the_variable_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ops, "forced", "cpu")
    monkeypatch.setattr(ops, "_missing", {"cpu": "not built (no compiler)"})
    with pytest.raises(ops.ImplementationError, match="FASTLORA_IMPL=cpu: cpu is not built .no compiler"):
        ops.read_environment()


@pytest.mark.skipif("cpu" not in implementations("lora_linear", "cpu"), reason="the native extension is not built")
def test_without_a_trial_measurements_decide_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FASTLORA_TRIAL=0 keeps from measuring; a table or cache that is there holds, and native C++ runs what is in none."""
    monkeypatch.setenv("FASTLORA_TRIAL", "0")
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTLORA_TABLE")
    monkeypatch.setattr(ops, "forced", None)
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "none")
    table.load_state(None)
    x = torch.ones(64, 4)
    assert operators.lora_linear.choose(x, x).implementation == "cpu"
    table.keep("cpu", [table.record("lora_linear", x.dtype, 64, "small", False, "cpu", 2.0)], "a test")
    table.load_state(None)  # as a process does that begins
    choice = operators.lora_linear.choose(x, x)
    assert choice.implementation == "reference"
    assert choice.reason.startswith(
        "plain PyTorch, since native C++ would take 2.00x of its time (measured on this machine"
    )
    assert operators.lora_linear.choose(x.bfloat16(), x.bfloat16()).implementation == "cpu"


def test_environment_without_the_extension() -> None:
    """Not built: the reference runs and the reason is told; asked for by name, it raises."""
    blocked = "import sys; sys.modules['fastlora._C'] = None\n" + CALL
    done = python(blocked)
    assert "implementation='reference'" in done.stdout and "not built" in done.stdout, done.stderr
    done = python(blocked, FASTLORA_IMPL="cpu")
    assert (
        done.returncode != 0
        and "ImplementationError: FASTLORA_IMPL=cpu: lora_linear cannot run: cpu is not built" in done.stderr
    )


def test_import_is_light() -> None:
    """`import fastlora` waits for none of the large packages."""
    done = python(
        "import sys, fastlora; print(sorted({'peft', 'transformers', 'triton', 'datasets'} & set(sys.modules)))"
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
