"""The trial in `accelerate`: it runs once for what is not known, where it may, and is kept. No test depends on a real time."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import make_layer
from filelock import FileLock
from measurements import a_machine, choose, entry, half_times, needs_native, restart, small_weights  # noqa: F401  (fixtures)
from torch import Tensor

import fastlora
from fastlora import functional, ops
from fastlora.choice import measure, problems, table, trial
from fastlora.frozen import packed, products


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
        known = {"cpu plain": 0.8, "cpu packed": 0.8 * saved, "cpu product": 0.9}
        return {name: known.get(name, 0.5) for name in functions}

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
    many, few = ["reference", "cpu product"], ["reference", "cpu product", "cpu few_rows"]
    by_rank = ["reference", *(f"cpu {way}" for way in table.WAYS["cpu", table.rank_case(2)])]
    assert timed == [few, many] * 2 + [many] * 2 + [by_rank] * 4 + [["reference", "cpu"]] * 8
    held = table.entries("cpu")
    assert {(one.rows, one.way) for one in held if one.op.startswith("frozen")} == {
        (rows, "product") for rows in (1, 8, 64)
    }
    ranked = [one for one in held if one.op.startswith(table.rank_case(2))]
    assert {(one.rows, one.dropout) for one in ranked} == {(64, False), (64, True)}
    held = [one for one in held if not one.op.startswith("frozen") and one not in ranked]
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
    assert len(timed) == 18
    fastlora.accelerate(peft_model(), frozen=True)
    model.add_adapter("other", model.peft_config["default"])
    fastlora.accelerate(model)
    assert {one.op.removesuffix("_backward") for one in table.entries("cpu")} == {
        "frozen_linear",
        table.rank_case(2),
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
    with monkeypatch.context() as patch:
        patch.setattr(table, "alone", lambda device_type: pytest.fail("nothing runs there, and a lock is asked for"))
        trial.try_out({"lora_linear": [torch.ones(8, 8, device="meta"), torch.ones(8, 8, dtype=torch.float64)]})
    assert timed == [] and not machine.exists()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        trial.try_out(small_weights())
    assert timed == []
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # nobody asks: it may raise there
        trial.try_out(small_weights())
    assert len(timed) == 8
    monkeypatch.setattr(table, "alone", lambda device_type: pytest.fail("nothing is missing, and a lock is asked for"))
    trial.try_out(small_weights())


@needs_native
def test_what_another_process_measured_meanwhile_is_not_measured(
    machine: Path, timed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is a file written that says nothing new; nor one where nothing could be measured."""
    kept: list[Any] = []
    missing, bars = iter((["one"], [])), []
    monkeypatch.setattr(trial, "_missing", lambda *_: next(missing))
    monkeypatch.setattr(table, "keep", lambda *what: kept.append(what))
    monkeypatch.setattr(trial, "tqdm", lambda steps, **bar: bars.append(bar) or steps)
    trial.try_out({"lora_linear": [torch.ones(8, 8)]})
    trial._try_out(torch.device("cpu"), problems.listed("cpu", ["lora_linear"], [torch.float64], ["small"]))
    assert timed == [] and kept == []
    assert all(bar["leave"] is False and bar["disable"] is None for bar in bars) and len(bars) == 2


@needs_native
@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_choose_as_the_first_does(
    rank: int, machine: Path, timed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"cpu": [list(entry(2.0))]}
    sent: list[Any] = []

    def broadcast(what: list[Any], src: int) -> None:
        sent.append((what[0], src))
        what[:] = [told] if rank else what

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    trial.try_out(small_weights())
    assert len(timed) == (0 if rank else 8)
    assert sent == [({"cpu": []} if rank else table.state(), 0)]
    assert table.is_fixed() is bool(rank) and choose() == ("reference" if rank else "cpu")


@needs_native
def test_a_torch_without_distributed_measures(
    machine: Path, timed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no `is_initialized`, either."""
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_initialized")
    trial.try_out(small_weights())
    assert len(timed) == 8


def test_where_a_weight_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, card = torch.device("cpu"), torch.device("cuda", 1)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for there, places in ((False, [cpu]), (True, [cpu, torch.device("cuda", 0)])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert trial._places(cpu) == places and trial._places(card) == [card]
    assert trial._dtypes(card, torch.float32) == [torch.float32, torch.bfloat16]
    assert trial._dtypes(card, torch.float16) == [torch.float16] and trial._dtypes(cpu, torch.float32) == [
        torch.float32
    ]


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
