"""What was measured, and what follows: the table, its lookup, `fastlora tune`, and the trial in `accelerate`. No test depends on a real time."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from bounds import gradients, make_layer
from filelock import FileLock
from torch import Tensor
from typer.testing import CliRunner

import fastlora
from fastlora import checkpoint, cli, environment, functional, operators, ops
from fastlora.choice import measure, problems, table, trial
from fastlora.choice.table import Measurement
from fastlora.frozen import packed, products
from fastlora.train import TrainConfig, train

NATIVE = ("lora_linear", "cpu") in ops.implementations
needs_native = pytest.mark.skipif(not NATIVE, reason="the native extension is not built")
ON_A_CPU = list(problems.operators)


def entry(
    ratio: float | None,
    op: str = "lora_linear",
    rows: int = 64,
    size: str = "small",
    dropout: bool = False,
    dtype: str = "float32",
    implementation: str = "cpu",
) -> Measurement:
    return Measurement(op, dtype, rows, size, dropout, implementation, ratio is not None, ratio, "measured by a test")


def hold(*entries: Measurement, device_type: str = "cpu") -> None:
    """Let these be all that is known."""
    table.load_state({device_type: entries})


def choose(
    rows: int = 64,
    elements: int = 2**20,
    dropout: bool = False,
    backward: bool = False,
    dtype: torch.dtype = torch.float32,
) -> str:
    like = torch.empty(1, 1, dtype=dtype)
    x, weight = like.expand(rows, 1024), like.expand(elements // 1024, 1024)
    return operators.lora_linear.choose(x, weight, dropout, backward).implementation


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine that nobody has measured, with a cache of its own and small shapes to measure; returns the path of the cache."""
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTLORA_TABLE")
    monkeypatch.setattr(ops, "forced", None)
    monkeypatch.setattr(table, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(problems, "SHAPES", {"small": (48, 40), "large": (56, 64)})
    monkeypatch.setattr(operators.prefix_concat, "BATCHES", ((64, "small", False), (512, "large", False)))
    monkeypatch.setitem(problems.LINEAR_ROWS, "cpu", (1, 8, 64))
    restart()
    return table.cache_path("cpu")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Every implementation takes half of plain PyTorch's time; returns what has been timed so far."""
    seen: list[list[str]] = []

    def half(functions: dict[str, Callable[..., Any]], *_: Any) -> dict[str, float]:
        seen.append(list(functions))
        return {name: 0.5 for name in functions if name != "reference"}

    monkeypatch.setattr(measure, "ratios", half)
    return seen


def restart() -> None:
    """Forget what the process knows: files are read anew."""
    table.load_state(None)


def small_weights() -> dict[str, list[Tensor]]:
    return {"lora_linear": [torch.ones(8, 8), torch.ones(8, 6)], "multi_lora": []}


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
    assert decide() == "reference"
    assert decide(triton) == "triton"
    assert decide(triton, cuda) == "cuda"
    assert decide(triton, cuda._replace(checked=False, ratio=None)) == "triton"
    assert decide(triton._replace(ratio=1.5), cuda._replace(ratio=1.2)) == "reference"
    # CUDA C++ is for tensor cores: 16 bits, and not before the oldest card that it is compiled for.
    assert ops.candidates("lora_linear", torch.device("cuda"), torch.float32) == ["triton"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert ops.candidates("lora_linear", torch.device("cuda"), torch.bfloat16) == ["triton"]
    assert decide(triton, cuda) == "triton"


@pytest.mark.parametrize(
    ("alone", "together", "runs"),
    [
        (0.6, ("triton", 0.5), "together"),
        (0.6, ("triton", 0.7), "each"),  # what runs them one by one gains more
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


@needs_native
def test_the_cache_lasts_and_goes_before_the_shipped_table(machine: Path) -> None:
    shipped = table.SHIPPED / f"{table.kind_of('cpu')}.json"
    table.write(shipped, "cpu", [entry(2.0), entry(2.0, rows=512)], "a test")
    restart()
    assert (choose(64), choose(512)) == ("reference", "reference")
    assert table.kind_of("cpu") in operators.lora_linear.choose(torch.ones(64, 1), torch.ones(1, 1)).reason
    assert table.keep("cpu", [entry(0.5)], "a test") == machine
    restart()
    assert (choose(64), choose(512)) == ("cpu", "reference")
    assert "this machine" in operators.lora_linear.choose(torch.ones(64, 1), torch.ones(1, 1)).reason
    assert [path.name for path in machine.parent.iterdir()] == [machine.name]  # nothing half-written is left


def test_the_smallest_ratio_can_be_read_again(machine: Path) -> None:
    table.keep("cpu", [table.record("lora_linear", torch.float16, 64, "small", False, "cpu", 1e-5)], "a test")
    restart()
    assert [one.ratio for one in table.entries("cpu")] == [0.001]


def spoil(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@needs_native
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (None, "Expecting"),
        ({"schema": 0}, "schema is 0, expected 1"),
        ({"torch": "1.0"}, "torch is '1.0'"),
        ({"kind": "z80"}, "kind is 'z80'"),
        ({"entries": [{"op": "lora_linear"}]}, "missing"),
        (
            {"entries": [{**entry(0.5)._asdict(), "ratio": "fast"}]},
            r"entries\[0\]: ratio='fast': expected float or None",
        ),
        ({"entries": None}, "entries: expected a list"),
    ],
)
def test_a_bad_cache_is_ignored_with_a_warning_and_replaced(
    changes: dict[str, Any] | None, message: str, machine: Path, timed: list[list[str]]
) -> None:
    table.keep("cpu", [entry(2.0)], "a test")
    if changes is None:
        machine.write_text(machine.read_text()[:-20])
    else:
        for one in changes.get("entries") or []:
            one.pop("origin", None)
        spoil(machine, **changes)
    restart()
    with pytest.warns(UserWarning, match=f"cache is ignored.*{re.escape(machine.name)}.*{message}"):
        assert choose() == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial.try_out(small_weights())
    restart()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(table.entries("cpu")) == 8  # forward and backward: 1, 8, 64 rows, and 64 with dropout


ENTRY = {**entry(0.5)._asdict(), "way": ""}
WRONG_TABLES: dict[str, Any] = {
    "no object": [],
    "null": None,
    "no entries": {"schema": 1, "entries": None},
    "entries of numbers": {"schema": 1, "entries": [3]},
    **{
        f"{name} is {value!r}": {"schema": 1, "entries": [{**ENTRY, name: value}]}
        for name, value in [
            ("op", ["lora_linear"]),
            ("dtype", {}),
            ("rows", 64.0),
            ("rows", 3),
            ("size", "huge"),
            ("dropout", 0),
            ("implementation", None),
            ("checked", 1),
            ("ratio", 0),
            ("ratio", -1.0),
            ("ratio", math.nan),
            ("ratio", math.inf),
            ("ratio", True),
            ("ratio", "0.5"),
            ("ratio", None),
            ("way", "nonsense"),
            ("way", []),
            ("colour", "blue"),
        ]
    },
}


@pytest.mark.parametrize("content", WRONG_TABLES.values(), ids=WRONG_TABLES)
def test_a_wrong_table_is_an_error_that_names_it(
    content: Any, machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tmp_path / "table.json"
    for one in content["entries"] or [] if isinstance(content, dict) else []:
        if isinstance(one, dict):
            one.pop("origin", None)
    named.write_text(json.dumps(content))
    monkeypatch.setenv("FASTLORA_TABLE", str(named))
    restart()
    with pytest.raises(ValueError, match=r"FASTLORA_TABLE: .*table\.json is no table for this machine"):
        table.entries("cpu")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 100_000, b'{"schema": ' + b"1" * 5000 + b"}", b"\0" * 64])
def test_a_table_that_is_no_json(
    content: bytes, machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tmp_path / "table.json"
    named.write_bytes(content)
    monkeypatch.setenv("FASTLORA_TABLE", str(named))
    restart()
    with pytest.raises(ValueError, match=r"FASTLORA_TABLE: .*table\.json is no table for this machine"):
        table.entries("cpu")


@needs_native
@pytest.mark.skipif(not packed.packs(torch.bfloat16), reason="no copies of bfloat16 weights here")
@pytest.mark.parametrize(
    ("saved", "expected"), [(0.5, "packed"), (0.94, "packed"), (0.96, "plain"), (1.0, "plain"), (2.0, "plain")]
)
def test_a_copy_is_made_where_it_was_measured_to_pay(
    saved: float, expected: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than 5 %: what was never measured has none, and what is measured after it is measured with it."""
    weight, x = torch.randn(48, 40).bfloat16(), torch.randn(64, 40).bfloat16()
    packed_products: list[str] = []  # by what was being timed
    onednn, timing = products._linear_pointwise, ["nothing"]

    def multiply(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        packed_products.extend(timing * weight.is_mkldnn)
        return onednn(x, weight, *rest)

    def ratios(functions: dict[str, Callable[..., Any]], calls: Any, *_: Any) -> dict[str, float]:
        for name, function in functions.items():
            timing[:] = [name]
            function(*calls[0])
        timing[:] = ["nothing"]
        return {name: {"cpu plain": 0.8, "cpu packed": 0.8 * saved}.get(name, 0.5) for name in functions}

    monkeypatch.setattr(products, "_linear_pointwise", multiply)
    monkeypatch.setattr(measure, "ratios", ratios)
    packed.register(weight, packed.Budget())
    functional.frozen_linear(x, weight, None)
    assert packed_products == []
    trial.try_out({"frozen_linear": [weight], "lora_linear": [weight]})
    assert set(packed_products) - {"nothing"} == {"cpu packed", "cpu"} - ({"cpu"} if expected == "plain" else set())
    restart()
    assert table.way("cpu", "frozen_linear", "cpu", torch.bfloat16, 64, weight.numel(), False) == expected
    packed_products.clear()
    functional.frozen_linear(x, weight, None)
    assert bool(packed_products) == (expected == "packed")
    packed.release(weight)


@pytest.mark.parametrize("name", ["none.json", "."])
def test_a_table_that_is_no_file_is_an_error_that_names_the_variable(
    name: str, machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTLORA_TABLE", str(tmp_path / name))
    restart()
    with pytest.raises(OSError, match=re.escape(f"FASTLORA_TABLE={tmp_path / name}: expected a file made by")):
        table.entries("cpu")


@needs_native
def test_a_named_table_stands_alone(
    machine: Path, timed: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.keep("cpu", [entry(0.5), entry(0.5, rows=1)], "a test")
    named = tmp_path / "table.json"
    table.write(named, "cpu", [entry(2.0)], "a test")
    spoil(named, kind="z80", torch="1.0")
    monkeypatch.setenv("FASTLORA_TABLE", str(named))
    restart()
    assert (choose(64), choose(1)) == ("reference", "reference")
    trial.try_out(small_weights())
    assert timed == []
    spoil(named, schema=0)
    restart()
    with pytest.raises(ValueError, match="table.json is no table for this machine: schema is 0, expected 1"):
        choose()


@needs_native
def test_a_cache_that_cannot_be_written_is_told(machine: Path) -> None:
    machine.parent.write_text("a file where the folder would be")
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert table.keep("cpu", [entry(2.0)], "a test") is None
    assert choose() == "reference"


def peft_model(**options: Any) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=31,
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "up_proj"], **options))


@needs_native
def test_the_trial_runs_once_and_is_kept(machine: Path, timed: list[list[str]]) -> None:
    model = peft_model()
    before = torch.get_rng_state()
    fastlora.accelerate(model)
    assert torch.equal(
        torch.get_rng_state(), before
    )  # a run's random numbers do not depend on whether there was a trial
    assert timed == [["reference", "cpu"]] * 8
    held = table.entries("cpu")
    assert {one.op for one in held} == {"lora_linear", "lora_linear_backward"}
    assert {(one.rows, one.dropout) for one in held} == {(1, False), (8, False), (64, False), (64, True)}
    assert {one.size for one in held} == {"small"} and {one.dtype for one in held} == {"float32"}
    for entry_ in fastlora.report(model):
        assert (
            entry_.implementation == "cpu"
            and "0.50x of plain PyTorch's time (measured on this machine" in entry_.reason
        )
    fastlora.accelerate(peft_model())
    restart()
    fastlora.accelerate(peft_model())
    assert len(timed) == 8
    fastlora.accelerate(peft_model(), frozen=True)
    model.add_adapter("other", model.peft_config["default"])
    fastlora.accelerate(model)
    assert {one.op.removesuffix("_backward") for one in table.entries("cpu")} == {
        "lora_linear",
        "multi_lora",
    }


@needs_native
def test_no_trial(machine: Path, timed: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Switched off, forced, compiling, a loaded state, a device without trials, a table that knows."""
    monkeypatch.setenv("FASTLORA_TRIAL", "0")
    trial.try_out(small_weights())
    monkeypatch.setenv("FASTLORA_TRIAL", "yes")
    with pytest.raises(ValueError, match="FASTLORA_TRIAL='yes': expected 0 or 1"):
        trial.try_out(small_weights())
    monkeypatch.setenv("FASTLORA_TRIAL", "1")
    with monkeypatch.context() as patch:
        patch.setattr(ops, "forced", "cpu")
        trial.try_out(small_weights())
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        trial.try_out(small_weights())
    table.load_state({})
    trial.try_out(small_weights())
    restart()
    trial.try_out({"lora_linear": [torch.ones(8, 8, device="meta"), torch.ones(8, 8, dtype=torch.float64)]})
    assert timed == [] and not machine.exists()
    trial.try_out(small_weights())
    assert len(timed) == 8


def test_a_model_that_is_yet_to_be_moved_has_a_trial_on_the_card(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(table, "kind_of", lambda device_type: f"a-{device_type}")
    monkeypatch.setattr(ops, "candidates", lambda op, device, dtype: ["one"])
    monkeypatch.setattr(trial, "_try_out", lambda device, todo: tried.append((str(device), len(todo))))
    trial.try_out(small_weights())
    assert tried == [("cpu", 4), ("cuda:1", 16)]  # there in bfloat16, too, for autocast


def test_no_trial_inside_a_compiled_step(machine: Path, timed: list[list[str]]) -> None:
    """A compiled layer computes by the default, and neither compiling nor running it measures anything."""
    layer = make_layer(5, 6, 7, 2)
    compiled = torch.compile(functional.lora_linear, backend="aot_eager", fullgraph=True)
    y = compiled(*layer[:5], 2.0)
    assert torch.allclose(y, functional.lora_linear(*layer[:5], 2.0))
    assert timed == [] and not machine.exists()


def wrong_value(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, xa, keep = ops.reference.lora_linear(*args)
    return [one + 1e-3 for one in y], xa, keep


def wrong_nan(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, xa, keep = ops.reference.lora_linear(*args)
    y[0][-1, -1] = torch.nan
    return y, xa, keep


def wrong_mask(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    *others, seed, order, offsets = args
    return ops.reference.lora_linear(*others, seed if seed is None else seed + 1, order, offsets)


def wrong_dtype(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, xa, keep = ops.reference.lora_linear(*args)
    return [one.double() for one in y], xa, keep


def wrong_keep(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, xa, keep = ops.reference.lora_linear(*args)
    return y, xa, ~keep


def wrong_and_loud(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    raise RuntimeError("illegal instruction")


@needs_native
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (wrong_value, "the error of result 0 is 0.001"),
        (wrong_nan, "the error of result 0 is nan"),
        (wrong_mask, "the error of result 0"),
        (wrong_keep, "the error of result 2 is 1"),
        (wrong_dtype, "result 0 is torch.float64"),
        (wrong_and_loud, "it raises RuntimeError: illegal instruction"),
    ],
)
def test_a_wrong_implementation_is_refused_for_good(
    wrong: Callable[..., Any], message: str, machine: Path, timed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "implementations", ops.implementations | {("lora_linear", "cpu"): wrong})
    with pytest.warns(UserWarning, match=f"cpu is refused for lora_linear: .*{message}"):
        trial.try_out(small_weights())
    for _ in range(2):
        assert choose(1) == choose(512) == "reference"
        assert choose(backward=True) == "cpu"  # its backward is right
        restart()  # the cache remembers
    layer = make_layer(3, 4, 5, 2)
    x, *lists = (one.detach() for one in layer[:5])
    [expected], *_ = ops.reference.lora_linear(x, *([one] for one in lists), [2.0], [0.0], None, None, None)
    y = functional.lora_linear(*layer[:5], 2.0)
    assert torch.equal(y, expected)
    assert all(grad.isfinite().all() for grad in gradients(y, [layer.x, layer.lora_a], layer.dy))


def apart(monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Measure in a process apart, as on a GPU, where lora_linear in native C++ is a function with this body."""
    lines = (
        "import os, signal, torch",
        "from fastlora import ops",
        "from fastlora.choice import measure, problems, trial",
        "problems.SHAPES = {'small': (48, 40), 'large': (56, 64)}",
        "measure.ratios = lambda functions, *_: {name: 0.5 for name in functions if name != 'reference'}",
        f"def faulty(*args): {body}",
        "ops.implementations['lora_linear', 'cpu'] = faulty",
        "trial.answer()",
    )
    monkeypatch.setattr(trial, "APART", ("cpu",))
    monkeypatch.setattr(trial, "ANSWER", "\n".join(lines))


@needs_native
@pytest.mark.parametrize(
    ("body", "how"),
    [
        ("os.abort()", "it ended its process (SIGABRT)"),
        ("os._exit(7)", "its process ended with code 7"),
        ("raise SystemExit('a fault')", "a fault"),
        ("raise ValueError('no good')", "it raises ValueError: no good"),
        (
            "print('noise'); y, *state = ops.reference.lora_linear(*args); return [0.5 * one for one in y], *state",
            "the error of result 0 is",
        ),
    ],
)
def test_what_ends_its_process_is_refused_and_the_rest_is_measured(
    body: str, how: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart(monkeypatch, body)
    with pytest.warns(UserWarning, match=f"cpu is refused for lora_linear: .*{re.escape(how)}"):
        trial.try_out(small_weights())
    for _ in range(2):
        assert {choose(rows) for rows in (1, 8, 64)} == {"reference"}
        assert {choose(rows, backward=True) for rows in (1, 8, 64)} == {"cpu"}
        assert len(table.entries("cpu")) == 8
        restart()  # the cache remembers
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trial.try_out({"lora_linear": [torch.empty(1).expand(2048, 2048)]})  # of another class: it is not run again
    assert choose(elements=2**22) == "reference" and choose(elements=2**22, backward=True) == "cpu"


@needs_native
@pytest.mark.parametrize(
    ("body", "how"),
    [
        ("raise torch.OutOfMemoryError('the card is full')", "the card is full"),
        ("raise RuntimeError('Triton Error [CUDA]: out of memory')", "out of memory"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("...\nraise OSError('no driver')", "no driver"),
    ],
)
def test_a_trial_that_cannot_run_blames_no_implementation(
    body: str, how: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart(monkeypatch, body)
    with pytest.warns(UserWarning, match=f"fastlora: no more is measured on cpu: .*{how}"):
        trial.try_out(small_weights())
    assert table.entries("cpu") == [] and not machine.exists()


@needs_native
def test_what_never_ends_is_refused(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (
        "import json, sys, time",
        "names, *_, refused = json.loads(sys.argv[1])",
        "if refused:",
        "    for _ in names: print(json.dumps(['found', [[], refused]]))",
        "    sys.exit()",
        """print(json.dumps(['trying', ['lora_linear', ['cpu']]]), flush=True)""",
        "time.sleep(600)",
    )
    monkeypatch.setattr(trial, "APART", ("cpu",))
    monkeypatch.setattr(trial, "PATIENCE", 1.0)
    monkeypatch.setattr(trial, "ANSWER", "\n".join(lines))
    with pytest.warns(UserWarning, match="cpu is refused for lora_linear: it did not end within 1 s"):
        trial.try_out(small_weights())


@needs_native
def test_a_process_that_hangs_as_it_ends_is_not_waited_for(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = (
        "import json, os, sys, time",
        "names, *_ = json.loads(sys.argv[1])",
        "for _ in names: print(json.dumps(['found', [[], []]]), flush=True)",
        "os.close(1)",
        "time.sleep(15)",
        f"open({str(tmp_path / 'ended')!r}, 'w')",
        "os._exit(0)",
    )
    monkeypatch.setattr(trial, "APART", ("cpu",))
    monkeypatch.setattr(trial, "PATIENCE", 1.0)
    monkeypatch.setattr(trial, "ANSWER", "\n".join(lines))
    trial.try_out(small_weights())
    assert not (tmp_path / "ended").exists()


@needs_native
def test_a_process_apart_has_this_ones_modules(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """Not those of the working directory, whatever sys.path holds besides, and whatever Python prints as it starts."""
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "statistics.py").write_text("raise RuntimeError('not this one')")
    (tmp_path / "sitecustomize.py").write_text("print('a word of welcome', flush=True)")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path] + [tmp_path])  # Python passes over a Path
    apart(monkeypatch, "return ops.reference.lora_linear(*args)")
    trial.try_out(small_weights())
    assert len(table.entries("cpu")) == 8
    assert not [one for one in recwarn if "fastlora" in str(one.message)]


@needs_native
def test_no_trial_where_no_process_can_be_started(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "APART", ("cpu",))
    monkeypatch.setattr(sys, "executable", "")
    with pytest.warns(UserWarning, match="no more is measured on cpu: no process can be started"):
        trial.try_out(small_weights())


@needs_native
def test_a_file_system_without_locks_stops_no_trial(
    machine: Path, timed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def acquire(lock: FileLock) -> None:
        raise NotImplementedError("no flock")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.warns(UserWarning, match="other processes may measure at the same time: .*no flock"):
        trial.try_out(small_weights())
    assert len(timed) == 8 and machine.exists()


@needs_native
def test_what_fails_in_one_size_is_used_in_none(
    machine: Path, timed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in sizes where it was right before: another way of the same implementation has none of its times."""
    monkeypatch.setitem(table.WAYS, ("cpu", "lora_linear"), ("good", "late"))
    native = ops.implementations["lora_linear", "cpu"]
    monkeypatch.setattr(measure, "ratios", lambda functions, *_: dict.fromkeys(functions, 0.5) | {"cpu late": 0.4})

    def late(x: Tensor, *args: Any) -> Any:
        return (wrong_value if table.forced_way == "late" and len(x) == 64 else native)(x, *args)

    monkeypatch.setattr(ops, "implementations", ops.implementations | {("lora_linear", "cpu"): late})
    with pytest.warns(UserWarning, match="cpu late is refused for lora_linear"):
        trial.try_out(small_weights())
    ways = {(one.op, one.rows): one.way for one in table.entries("cpu")}
    both = ("lora_linear", "good"), ("lora_linear_backward", "late")
    assert ways == {(op, rows): way for op, way in both for rows in (1, 8, 64)}


@needs_native
@pytest.mark.parametrize("dtype", ops.KERNEL_DTYPES)
@pytest.mark.parametrize("op", ON_A_CPU)
def test_right_implementations_pass(op: str, dtype: torch.dtype, timed: list[list[str]], machine: Path) -> None:
    for problem in problems.listed("cpu", [op], [dtype], ["small"]):
        found = measure.one_class(problem, torch.device("cpu"), 0.0)
        assert [one.op for one in found] == [op, f"{op}_backward"]
        assert all(one.checked and one.ratio == 0.5 and one.rows == problem.rows for one in found)


class FakeTime:
    """A clock that only the timed functions move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int]] = []

    def function(self, name: str, seconds: float) -> Callable[[int], None]:
        def run(copy: int) -> None:
            self.now += seconds
            self.calls.append((name, copy))

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTime]:
    fake = FakeTime()
    monkeypatch.setattr(time, "perf_counter", lambda: fake.now)
    yield fake


def test_times_are_taken_in_turn(clock: FakeTime) -> None:
    functions = {"reference": clock.function("reference", 1.1e-4), "cpu": clock.function("cpu", 7.7e-5)}
    found = measure.ratios(functions, [(0,), (1,)], torch.device("cpu"), 0.01)
    assert found == {"cpu": pytest.approx(0.7)}
    # One call each, the other one on both weights, one call each again; then what fills the shortest sample, in turn.
    assert "".join(name[0] for name, _ in clock.calls[:21]) == "rc" + "cc" + "rc" + "rrccc" + "cccrr" + "rrccc"
    assert [copy for _, copy in clock.calls[:21]] == [turn % 2 for turn in range(21)]


def test_a_long_call_is_timed_once(clock: FakeTime) -> None:
    functions = {"reference": clock.function("reference", 10.0), "cpu": clock.function("cpu", 1.0)}
    assert measure.ratios(functions, [(0,)], torch.device("cpu"), 0.01) == {"cpu": pytest.approx(0.1)}
    assert len(clock.calls) == 2


@needs_native
def test_tune_writes_a_table_that_is_used(machine: Path, timed: list[list[str]], tmp_path: Path) -> None:
    shipped = table.SHIPPED / f"{table.kind_of('cpu')}.json"
    done = CliRunner().invoke(cli.app, ["tune", "--output", str(shipped)])
    assert done.exit_code == 0, done.output
    assert "lora_linear_backward" in done.output and "0.50" in done.output and str(shipped) in done.output
    assert not machine.exists()
    head = json.loads(shipped.read_text())
    assert head["kind"] == shipped.stem and head["command"] == f"fastlora tune --device cpu --output {shipped.name}"
    assert head["torch"] == torch.__version__ and head["threads"] == torch.get_num_threads() and head["date"]
    restart()
    for problem in problems.listed("cpu", ON_A_CPU, ops.KERNEL_DTYPES, ["small", "large"]):
        for op in (problem.op, f"{problem.op}_backward"):
            assert table.has("cpu", op, *problem[1:]), (op, problem)
    timed.clear()
    trial.try_out(small_weights())
    assert timed == []  # all is known


@needs_native
def test_tune_keeps_its_measurements(machine: Path, timed: list[list[str]]) -> None:
    path, found = trial.tune_machine("cpu", progress=False)
    assert path == machine and len(found) == len(table.entries("cpu"))
    assert choose() == "cpu"
    findings = {one.name: one for one in environment.all_findings() if one.part == "measurements"}
    assert findings["cpu"].present and f"{len(found)} measured on this machine" in findings["cpu"].detail
    assert findings["trial"].present and str(machine.parent) in findings["trial"].detail


@needs_native
def test_tune_ends_in_time_with_what_it_has(machine: Path, timed: list[list[str]], tmp_path: Path) -> None:
    whole = problems.listed("cpu", ON_A_CPU, ops.KERNEL_DTYPES, list(problems.SHAPES))
    path, found = trial.tune_machine("cpu", tmp_path / "cut.json", progress=False, seconds=0)
    assert {one.op for one in found} == {whole[0].op, f"{whole[0].op}_backward"}
    assert len(json.loads(path.read_text())["entries"]) == len(found)


def test_tune_says_what_it_cannot(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="device='tpu': expected cpu or cuda"):
        trial.tune_machine("tpu", progress=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no CUDA card"):
        trial.tune_machine("cuda", progress=False)
    monkeypatch.setattr(
        ops, "implementations", {key: value for key, value in ops.implementations.items() if key[1] == "reference"}
    )
    with pytest.raises(ValueError, match="nothing but plain PyTorch runs on cpu"):
        trial.tune_machine("cpu", progress=False)


def shipped_tables() -> list[Path]:
    return sorted(table.SHIPPED.glob("*.json"))


LEFT_TO_THE_TRIAL = {"amd-zen4-avx512bf16": ["frozen_linear", "multi_lora_shared"]}
"""What a table was made before: there each machine measures it for itself."""


@pytest.mark.parametrize("path", shipped_tables(), ids=lambda path: path.stem)
def test_shipped_tables_are_whole(path: Path) -> None:
    """Each covers every class, and everything in it passed its check."""
    covered = [op for op in ON_A_CPU if op not in LEFT_TO_THE_TRIAL.get(path.stem, [])]
    shipped = table._read(path, {"schema": table.SCHEMA, "kind": path.stem})
    assert all(one.checked for one in shipped.values())
    table.load_state({"cpu": shipped.values()})
    for problem in problems.listed("cpu", covered, ops.KERNEL_DTYPES, list(problems.SHAPES)):
        for op in (problem.op, f"{problem.op}_backward"):
            assert table.has("cpu", op, *problem[1:]), (op, problem)


@needs_native
def test_a_state_keeps_the_choice(machine: Path, timed: list[list[str]], tmp_path: Path) -> None:
    """As a checkpoint keeps it: through torch.save and a strict torch.load, whatever has been measured since."""
    table.keep("cpu", [entry(2.0)], "a test")
    torch.save(table.state(), tmp_path / "state.pt")
    table.keep("cpu", [entry(0.5), entry(0.5, rows=1)], "a test")
    assert (choose(64), choose(1)) == ("cpu", "cpu")
    table.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (choose(64), choose(1)) == ("reference", "reference")
    trial.try_out(small_weights())
    assert timed == [] and table.is_fixed()
    restart()
    assert (choose(64), choose(1)) == ("cpu", "cpu")


@needs_native
def test_a_resumed_run_chooses_as_the_run_before(machine: Path, tmp_path: Path) -> None:
    with tiny.on_cpu():
        options = {
            "model": str(tiny.save_model(tmp_path / "model")),
            "output": tmp_path / "out",
            "r": 2,
            "max_steps": 2,
        }
        config = TrainConfig(data=tiny.save_data(tmp_path / "data.jsonl", 8), save_steps=1, **options)
        table.keep("cpu", tiny_measurements(2.0), "a test")
        before = train(config, progress=False)
        table.keep("cpu", tiny_measurements(0.5), "a test")
        shutil.rmtree(checkpoint.folder(config.output, 2))
        after = train(replace(config, resume=True), progress=False)
    assert before.implementations == after.implementations and before.implementations["reference"] >= 14


def tiny_measurements(ratio: float) -> list[Measurement]:
    """One for every class that a tiny model's trial would look at."""
    todo = problems.listed("cpu", ["lora_linear", "lora_linear_shared"], [torch.float32], ["small"])
    return [entry(ratio, op, one.rows, dropout=one.dropout) for one in todo for op in (one.op, f"{one.op}_backward")]


RANK = """
import sys, torch
from pathlib import Path
from fastlora import operators, ops
from fastlora.choice import measure, problems, table, trial
table.SHIPPED = Path(sys.argv[2], "no", "tables")
rank, ratio = int(sys.argv[1]), float(sys.argv[3])
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
measure.ratios = lambda functions, *_: {name: ratio for name in functions if name != "reference"}
trial.try_out({"lora_linear": [torch.ones(8, 8)]})
print(operators.lora_linear.choose(torch.ones(64, 8), torch.ones(8, 8)).implementation, table.is_fixed())
torch.distributed.destroy_process_group()
"""


def side_by_side(script: str, arguments: list[list[str]], caches: list[Path]) -> list[str]:
    """What processes with these arguments print that run at the same time."""
    running = []
    for own, cache in zip(arguments, caches, strict=True):
        environment = {**os.environ, "FASTLORA_CACHE": str(cache), "PYTHONPATH": os.pathsep.join(sys.path)}
        environment["FASTLORA_IMPL"] = ""
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, "-c", script, *own]
        running.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    outputs = [process.communicate(timeout=120) for process in running]
    assert all(process.returncode == 0 for process in running), outputs
    return [out for out, _ in outputs]


@needs_native
def test_rank_0_decides_for_all(machine: Path, tmp_path: Path) -> None:
    """Each rank would measure something else, on a disk of its own; only rank 0 measures, and both choose as it does."""
    arguments = [[str(rank), str(tmp_path / "meeting"), ratio] for rank, ratio in enumerate(("2.0", "0.5"))]
    caches = [tmp_path / "cache0", tmp_path / "cache1"]
    outputs = side_by_side(RANK, arguments, caches)
    assert [out.split() for out in outputs] == [["reference", "False"], ["reference", "True"]]
    assert caches[0].exists() and not caches[1].exists()


ONE_OF_MANY = """
import sys, time, torch
from pathlib import Path
from fastlora import operators, ops
from fastlora.choice import measure, problems, table, trial
own, other = Path(sys.argv[1]), Path(sys.argv[2])
table.SHIPPED = own.parent / "no" / "tables"
own.touch()
while not other.exists():
    time.sleep(0.01)
measured = []
def ratios(functions, *_):
    time.sleep(0.05)
    measured.append(1)
    return {name: float(sys.argv[3]) for name in functions if name != "reference"}
measure.ratios = ratios
trial.try_out({"lora_linear": [torch.ones(8, 8)]})
print(operators.lora_linear.choose(torch.ones(64, 8), torch.ones(8, 8)).implementation, len(measured))
"""


@needs_native
def test_processes_that_do_not_know_of_one_another_choose_alike(machine: Path, tmp_path: Path) -> None:
    """As under torchrun before torch.distributed begins: whoever is first measures, the others wait and take what it has found."""
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    outputs = side_by_side(ONE_OF_MANY, [[here, there, "2.0"], [there, here, "0.5"]], [tmp_path / "cache"] * 2)
    (first, one), (second, two) = (out.split() for out in outputs)
    assert first == second and sorted((int(one), int(two)))[0] == 0 < int(one) + int(two)
