"""choice/measure.py: what is wrong is refused for good, what is right passes, and times are taken in turn. No test depends on a real time."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import gradients, make_layer
from measurements import ON_A_CPU, a_machine, choose, entry, half_times, needs_native, restart, small_weights  # noqa: F401  (fixtures)
from torch import Tensor

from fastlora import functional, ops
from fastlora.bounds import Errors
from fastlora.choice import measure, problems, table, trial
from fastlora.frozen import packed
from fastlora.operators import lora_linear


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
        assert [one.op for one in found] == [name for name in (op, f"{op}_backward") if name in ops.CASES]
        assert all(one.checked and one.ratio == 0.5 and one.rows == problem.rows for one in found)


def one_class(dropout: bool = False, dtype: torch.dtype = torch.float32, **options: Any) -> list[table.Measurement]:
    problem = problems.Problem("lora_linear", dtype, 8, "small", dropout)
    return measure.one_class(problem, torch.device("cpu"), 0.0, **options)


@needs_native
def test_whoever_watches_is_told_what_runs(machine: Path, timed: list[list[str]]) -> None:
    """What is checked, then what is timed, then that nothing runs: of each operator, and nothing of what is refused."""
    told: list[tuple[str, list[str]]] = []
    refused = {("lora_linear", "float32", "cpu")}
    found = one_class(refused=refused, trying=lambda op, runs: told.append((op, list(runs))))
    assert told == [("lora_linear", []), ("lora_linear", [])] + [
        ("lora_linear_backward", runs) for runs in (["cpu"], ["cpu"], [])
    ]
    assert [one.checked for one in found] == [False, True]
    assert timed == [["reference"], ["reference", "cpu"]]


def test_each_implementation_has_its_own_time(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ops_of = ("lora_linear", "lora_linear_backward")
    plain = {(op, name): ops.implementation(op, "reference") for op in ops_of for name in ("cpu", "cuda")}
    monkeypatch.setattr(ops, "implementations", ops.implementations | plain)
    monkeypatch.setattr(ops, "candidates", lambda *_: ["cpu", "cuda"])
    monkeypatch.setattr(measure, "ratios", lambda *_: {"cpu": 0.5, "cuda": 0.4})
    times = [(one.op, one.implementation, one.ratio) for one in one_class()]
    assert times == [(op, *one) for op in ops_of for one in (("cpu", 0.5), ("cuda", 0.4))]


def test_nothing_is_drawn_where_only_plain_pytorch_runs(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "Draw", None)
    monkeypatch.setattr(lora_linear, "Draw", None)
    assert one_class(dtype=torch.float64) == []


@needs_native
def test_dropout_is_checked_in_every_class(
    machine: Path, timed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And bias and odd sizes with it: also where what is timed has none of them."""
    monkeypatch.setattr(ops, "implementations", ops.implementations | {("lora_linear", "cpu"): wrong_mask})
    with pytest.warns(
        UserWarning, match=r"cpu is refused for lora_linear: torch.float32 \[37, 100\], \[75, 100\], \[75\], .*result 0"
    ):
        assert [one.checked for one in one_class()] == [False, True]


@needs_native
def test_autocast_and_gradients_are_off_while_something_is_measured(
    machine: Path, timed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    native, seen = ops.implementations["lora_linear", "cpu"], []

    def look(*args: Any) -> Any:
        seen.append((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return native(*args)

    monkeypatch.setattr(ops, "implementations", ops.implementations | {("lora_linear", "cpu"): look})
    with torch.autocast("cpu", torch.bfloat16):
        assert all(one.checked for one in one_class())
    assert seen and set(seen) == {(False, False)}


def call_of(op: str) -> tuple[Any, ...]:
    calls = problems.operators[op.removesuffix("_backward")].calls(8, 48, 40, torch.float32, torch.device("cpu"), False)
    return calls[op][0]


@pytest.mark.parametrize("op", [op for op in ops.CASES if op.removesuffix("_backward") in ON_A_CPU])
def test_plain_pytorch_is_right_and_a_wrong_number_in_any_result_is_found(
    op: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, call, place = ops.implementations[op, "reference"], call_of(op), [0]

    def wrong(*args: Any) -> Any:
        results = plain(*args)
        several = results if isinstance(results, tuple) else (results,)
        flat = [one for part in several for one in (part if isinstance(part, list) else [part])]
        if flat[place[0]].is_floating_point():
            flat[place[0]].view(-1)[:1] += 1
        return results

    assert measure.find_flaw(op, "reference", call) is None
    monkeypatch.setattr(ops, "implementations", ops.implementations | {(op, "cuda"): wrong})
    found = measure._results(op, plain, call)
    for number, one in enumerate(found):
        place[0] = number
        flaw = measure.find_flaw(op, "cuda", call)
        if one.is_floating_point() and one.numel():
            assert flaw is not None and f"the error of result {number} is" in flaw


def test_a_call_is_told_by_its_first_dtype_and_all_shapes() -> None:
    call = torch.ones(2, 3, dtype=torch.bfloat16), 1.0, [torch.ones(4), torch.ones(())], None
    assert measure._shown(call) == "torch.bfloat16 [2, 3], [4], []"


def test_a_result_that_is_missing_is_no_right_one(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not an implementation's fault, but its author's: whoever measures is told."""
    plain = ops.implementations["swiglu_backward", "reference"]
    fewer = {("swiglu_backward", "cuda"): lambda *args: plain(*args)[:1]}
    monkeypatch.setattr(ops, "implementations", ops.implementations | fewer)
    with pytest.raises(ValueError, match="longer"):
        measure.find_flaw("swiglu_backward", "cuda", call_of("swiglu_backward"))


@pytest.mark.parametrize("op", ["multi_lora", "multi_lora_shared"])
def test_dropouts_bits_count_where_a_backward_reads_them(
    op: str, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every row that has an adapter, and in no other."""
    [call] = problems.operators[op].calls(8, 48, 40, torch.float32, torch.device("cpu"), True)[op]
    order, offsets = call[-2:]
    assert 0 < offsets[1] < 8
    for place, row in enumerate(order):

        def wrong(*args: Any, row: Tensor = row) -> Any:
            ys, xa, keep = ops.reference.lora_linear(*args)
            keep[:, row, 0] ^= 1
            return ys, xa, keep

        monkeypatch.setattr(ops, "implementations", ops.implementations | {(op, "cuda"): wrong})
        assert (measure.find_flaw(op, "cuda", call) is not None) is (place >= int(offsets[1]))


@pytest.mark.parametrize("late", [1, 2])
def test_a_fault_that_the_device_finds_late_is_one(late: int, machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device on which nothing runs any more, neither what is waited for next, is a fault of no implementation."""
    waits: list[torch.device] = []

    def wait_for(device: torch.device) -> None:
        waits.append(device)
        if len(waits) <= late:
            raise RuntimeError("a late fault")

    monkeypatch.setattr(measure, "wait_for", wait_for)
    if late == 1:
        flaw = measure.find_flaw("lora_linear", "reference", call_of("lora_linear"))
        assert flaw is not None and flaw.endswith("it raises RuntimeError: a late fault")
    else:
        with pytest.raises(RuntimeError, match="a late fault"):
            measure.find_flaw("lora_linear", "reference", call_of("lora_linear"))
    assert len(waits) == 2


@pytest.mark.parametrize(
    ("found", "flaw"),
    [
        ([(2.0, 1.0)], None),
        ([(3.0, 1.0), *[(2.0, 1.0)] * 6, (1.0, 1.5)], None),
        ([(3.0, 1.0), *[(2.0, 1.0)] * 7], "the error of result 0 is 3, its bound 2"),
        ([(3.0, 1.0), *[(1.0, 1.5)] * 6, (4.0, 1.0)], "the error of result 0 is 4, its bound 3"),
        ([(3.0, 1.0), *[(2.0, 2.0)] * 6, (math.nan, 1.0)], "the error of result 0 is nan"),
    ],
    ids=["right", "bad luck", "wrong", "wrong in another", "NaN in another"],
)
def test_one_bad_draw_refuses_nothing(
    found: list[tuple[float, float]], flaw: str | None, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest errors of eight inputs count, eager's too; only where the first is outside its bound are there seven more."""
    errors = iter(found)
    monkeypatch.setattr(measure.bounds, "compare", lambda *_: Errors(*next(errors), 0.0))
    call = call_of("swiglu")
    told = measure.find_flaw("swiglu", "reference", call, others=[call] * 7)
    assert told is None if flaw is None else told is not None and flaw in told
    assert next(errors, None) is None


@needs_native
def test_seven_more_inputs_are_other_ones(
    machine: Path, timed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same sizes; and what is drawn later is what was drawn before."""
    seen: list[Tensor] = []

    def wrong(x: Tensor, *args: Any) -> Any:
        seen.append(x)
        return wrong_value(x, *args)

    monkeypatch.setattr(ops, "implementations", ops.implementations | {("lora_linear", "cpu"): wrong})
    with pytest.warns(UserWarning, match="cpu is refused for lora_linear"):
        one_class()
    assert len(seen) == 8 and {one.shape for one in seen} == {(37, 100)}
    assert len({one[0, 0].item() for one in seen}) == 8
    first = call_of("swiglu")[0]
    assert torch.equal(first, call_of("swiglu")[0]) and problems.seed == 0


FULL = [
    torch.OutOfMemoryError("full"),
    RuntimeError("[CUDA]: out of memory"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."
    ),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
]


WRONG_OPTION = "pick, csrc/cpu/isa.cpp:61, FASTLORA_ISA=avx1024: expected portable"  # as torch words what csrc says


@pytest.mark.parametrize("fault", [*FULL, RuntimeError(WRONG_OPTION)], ids=repr)
def test_a_full_memory_or_a_wrong_option_is_no_flaw(
    fault: Exception, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*args: Any) -> Any:
        raise fault

    monkeypatch.setattr(ops, "implementations", ops.implementations | {("lora_linear", "cpu"): run})
    with pytest.raises(type(fault)):
        measure.find_flaw("lora_linear", "cpu", call_of("lora_linear"))


@needs_native
@pytest.mark.parametrize("fault", FULL, ids=repr)
def test_where_memory_is_full_a_trial_ends_with_a_warning(
    fault: Exception, machine: Path, timed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what was measured before is kept: the model goes on with that."""
    native = ops.implementations["lora_linear", "cpu"]

    def run(x: Tensor, *args: Any) -> Any:
        if len(x) == 64:
            raise fault
        return native(x, *args)

    monkeypatch.setattr(ops, "implementations", ops.implementations | {("lora_linear", "cpu"): run})
    with pytest.warns(UserWarning, match=f"no more is measured on cpu: {type(fault).__name__}: ") as told:
        trial.try_out(small_weights())
    assert len(told) == 1
    restart()
    assert {one.rows for one in table.entries("cpu")} == {1, 8} and all(one.checked for one in table.entries("cpu"))


@needs_native
def test_what_nobody_expects_ends_a_trial(
    machine: Path, timed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError(WRONG_OPTION)

    monkeypatch.setattr(ops, "implementations", ops.implementations | {("lora_linear", "cpu"): refuse})
    with pytest.raises(RuntimeError, match="avx1024"):
        trial.try_out(small_weights())
    assert not machine.exists()


def test_what_failed_in_a_way_that_is_not_known_failed_in_all() -> None:
    known = [entry(None), entry(0.5), entry(None, "frozen_linear_backward"), entry(0.5, "multi_lora")]
    refused = {
        ("lora_linear", "float32", "cpu"),
        *(("frozen_linear_backward", "float32", f"cpu {way}") for way in table.WAYS["cpu", "frozen_linear"]),
    }
    assert measure.refused_before(known) == refused
    assert not measure.is_refused(known[0], refused) and measure.is_refused(known[1], refused)
    assert not measure.is_refused(entry(0.5, "multi_lora"), refused)
    assert not measure.is_refused(entry(0.5, "frozen_linear_backward"), refused)
    assert measure.is_refused(entry(0.5, "frozen_linear_backward")._replace(way="packed"), refused)
    without = entry(0.5, "frozen_linear")._replace(way="packed", without_copy="plain")
    assert measure.is_refused(without, {("frozen_linear", "float32", "cpu plain")})
    assert measure.is_refused(without, {("frozen_linear", "float32", "cpu packed")})
    assert not measure.is_refused(
        without, {("frozen_linear", "float32", "cpu"), ("frozen_linear", "float32", "cpu few_rows")}
    )


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({}, ("", "")),
        ({"": 2.0}, ("", "")),
        ({"fused": 0.7, "library": 0.6}, ("library", "")),
        ({"torch": 1.0}, ("torch", "")),
        ({"torch": 1.0, "product": 0.97}, ("product", "")),
        ({"torch": 1.0, "product": 0.99}, ("torch", "")),
        ({"torch": 1.0, "product": 0.7, "few_rows": 0.6}, ("few_rows", "")),
        ({"torch": 1.0, "packed": 0.95}, ("packed", "torch")),
        ({"torch": 1.0, "packed": 0.96}, ("torch", "")),
        ({"torch": 1.0, "few_rows": 0.8, "packed": 0.75}, ("packed", "few_rows")),
        ({"torch": 1.0, "few_rows": 0.8, "packed": 0.77}, ("few_rows", "")),
        ({"torch": 1.0, "plain": 0.99, "packed": 0.5}, ("packed", "torch")),
        ({"packed": 0.99}, ("packed", "")),
    ],
    ids=str,
)
def test_the_fastest_way(times: dict[str, float], expected: tuple[str, str]) -> None:
    """torch's unless another gains 2 %, and a copy where it saves 5 % of the fastest without; what runs where there is no room for one, too."""
    assert measure._fastest(times) == expected


@needs_native
def test_torchs_way_is_neither_checked_nor_timed(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only what can run with these rows and dtype is, forward and backward apart."""
    seen: list[list[str]] = []
    dtype_of_16 = torch.bfloat16 if packed.suits_onednn(torch.bfloat16) else torch.float16  # without AVX-512

    def ratios(functions: dict[str, Callable[..., Any]], *_: Any) -> dict[str, float]:
        seen.append(list(functions))
        return {"cpu product": 1.1, "cpu few_rows": 0.6, "cpu plain": 1.2, "cpu packed": 0.9}

    monkeypatch.setattr(measure, "ratios", ratios)
    monkeypatch.setattr(packed, "packs", lambda dtype: dtype is dtype_of_16)
    monkeypatch.setattr(packed, "suits_onednn", lambda dtype: dtype is dtype_of_16)
    found, told = [], []
    for dtype, rows in ((torch.float32, 8), (dtype_of_16, 8), (dtype_of_16, 64)):
        problem = problems.Problem("frozen_linear", dtype, rows, "small", False)
        found += measure.one_class(problem, torch.device("cpu"), 0.0, trying=lambda op, runs: told.extend(runs))
    assert all(one.checked for one in found) and "cpu torch" not in told
    onednn = ["cpu plain", "cpu packed"] if torch.backends.mkldnn.is_available() else []
    many = [*onednn, "cpu product"]
    others = [["cpu product", "cpu few_rows"], ["cpu product"], *[[*many, "cpu few_rows"]] * 2, *[many] * 2]
    assert [names[1:] for names in seen] == others
    ways = [("few_rows", ""), ("torch", ""), *[("few_rows", "")] * 2, *[("packed", "torch")] * 2]
    assert [(one.way, one.without_copy) for one in found] == ways
    assert [one.ratio for one in found] == [0.6, 1.0, 0.6, 0.6, 0.9, 0.9]


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
    assert measure.ratios({"reference": functions["reference"]}, [(0,)], torch.device("cpu"), 0.01) == {}
    assert len(clock.calls) == 2  # nothing to compare with
