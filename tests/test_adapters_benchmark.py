"""`python -m benchmarks adapters`: every goal of many adapters in one table, on tiny models. No time is asserted."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import served
import tiny
import torch

from benchmarks import __main__ as command
from benchmarks import adapters, sweep
from benchmarks.gate import CaseError
from benchmarks.goals import Goal
from benchmarks.model_steps import Material
from benchmarks.session import Session

SESSION = Session(torch.device("cpu"))


def test_the_lines_are_the_issues_table(tmp_path: Path) -> None:
    quick, whole = (list(adapters.adapter_lines(Material(), quick)) for quick in (True, False))
    assert len(quick) == 1 + len(adapters.FORWARDS) + 1 and not any("serve" in title for title in quick)
    assert len(whole) == 1 + 2 + 2 * len(adapters.FORWARDS) + 1
    twelve = Material("M", tmp_path / "rows.jsonl")
    assert list(adapters.adapter_lines(twelve, False))[-1] == "sweep, 12 jobs with halving, bfloat16"
    ranks = adapters.FORWARDS[-1].ranks
    assert len(ranks) == 32 and (min(ranks), max(ranks)) == (4, 64) and len(set(ranks)) == 32
    wanted = {(one.rows, one.tokens, one.goal) for one in adapters.FORWARDS}
    assert wanted == {(8, 1, 1.25), (32, 1, 1.25), (8, 128, 1.1), (32, 1, 1.5)}
    assert "adapters" in command.WITHIN and "adapters" in command.VERBS


def test_a_forward_has_its_bounds_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    one = adapters.Forward("decode", 4, 1, (2, 8), 1.25)
    [goal] = adapters._forward(SESSION, one, "float32", adapters.TINY, 0.05)
    assert goal.ours > 0 and goal.peft is not None and goal.goal == 1.25 and "all of it" in goal.rivals
    assert {adapters.MEMORY, adapters.PRODUCTS, "base", "peft", "fastlora"} <= goal.seconds.keys()
    monkeypatch.setattr(adapters, "bandwidths", lambda _: {"copy": 1.0})
    monkeypatch.setattr(adapters, "product_rate", lambda *_: 1.0)
    bare = torch.nn.Sequential(torch.nn.Embedding(10, 4), torch.nn.Linear(4, 3, bias=False))
    bare.get_input_embeddings = lambda: bare[0]  # type: ignore[operator]
    adapted = torch.nn.ModuleDict({"x": torch.nn.ParameterDict({"lora_A": torch.zeros(2, 4)})})
    adapted.named_parameters = lambda: [("x.lora_A.a", torch.zeros(2, 4))]  # type: ignore[method-assign, assignment]
    found = adapters.bounds(SESSION, adapters.Forward("", 5, 1, (2, 2), 1.0), bare, adapted, torch.float32)
    assert found == {adapters.MEMORY: 4 * (12 + 8 + 5 * 4), adapters.PRODUCTS: 2 * 5 * 12 + 2 * 5 * 8 / 2}
    monkeypatch.setattr(adapters, "nearly_equal", lambda *_: False)
    with pytest.raises(CaseError, match="fastlora has other logits than PEFT: not timed"):
        list(adapters._forward(SESSION, one, "float32", adapters.TINY, 0.05))


def test_a_bank_is_timed_by_who_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "TOKENS", 3)
    served.save(tmp_path)
    for name, own in (("a0", "red"), ("a1", "green"), ("a2", "blue")):
        (tmp_path / "adapters" / own).rename(tmp_path / "adapters" / name)
    engine = served.load(tmp_path, max_rows=3, max_length=2048 // 8, max_adapter_bytes=1 << 20)
    monkeypatch.setattr(adapters, "LONG", 200)
    with served.running(engine):
        cold, warm, step = adapters.waits(engine, ["a1", "a2"], 4)
        bank = engine.adapters.bank
        assert bank is not None and bank.stats.loads == 3
    assert min(cold.longest, cold.first, warm.longest, warm.first, step) > 0
    file = tmp_path / "adapters" / "a0" / "adapter_model.safetensors"
    assert sum(one["bytes"] for one in adapters._tensors(file)) == bank.stats.bytes - sum(
        sum(one["bytes"] for one in adapters._tensors(tmp_path / "adapters" / name / file.name))
        for name in ("a1", "a2")
    )


def test_sweeps_are_told_as_goals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gain = sweep.Gain("float32", 64, 2.0, 1.0, 1.5, 4.0, 5.0)
    ours, peft = adapters._sweep(SESSION, lambda _: iter([gain]))
    assert (ours.ours, ours.is_met(), peft.ours, peft.is_met()) == (4.0, True, 5.0, False)
    assert peft.seconds["peft"] == sweep.JOBS * 1.5
    monkeypatch.setattr(adapters, "RANKS", (2, 4))
    monkeypatch.setattr(adapters, "RATES", (1e-3, 1e-2))
    monkeypatch.setattr(adapters, "ROWS", 20)
    model = tiny.save_model(tmp_path / "model")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(40)))
    with tiny.on_cpu():
        [goal] = adapters._halving(SESSION, Material(str(model), data), "float32")
    assert goal.case == "4 jobs, 20 dialogues, model" and goal.goal == 2.0 and goal.at_least and goal.ours > 0


def test_each_row_is_told_as_it_comes_and_all_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    spent = {"fastlora": 2e-3, adapters.MEMORY: 1e-3, adapters.PRODUCTS: 1e-6}
    rows = [
        Goal("decode", "8 rows", "float32", 1.25, 1.2, 3.0, seconds=spent, rivals={"all of it": 0.9}),
        Goal("a bank", "40", "float32", None, 12.0, None, unit="ms"),
        Goal("serve", "32 clients", "float32", 6.0, 5.0, None, at_least=True),
    ]

    def line(_: Any) -> Iterator[Goal]:
        for row in rows:
            yield row
            told.append(capsys.readouterr().out)

    told: list[str] = []
    assert list(adapters._telling(SESSION, line)) == rows
    first = (
        "case 8 rows, numbers float32, wanted ≤ 1.25, fastlora 1.20, PEFT 3.00, met yes, takes 2 ms, memory bound 1 ms"
    )
    assert told[0] == f"decode: {first}, product bound 1 us, beside all of it 0.90\n"
    assert told[1] == "a bank: case 40, numbers float32, fastlora 12 ms\n" and "wanted ≥ 6, fastlora 5.00" in told[2]
    table = adapters.adapters_table(rows, ["a note"])
    assert "1 of 2 goals are met" in table and table.endswith("a note") and "memory bound" in table.splitlines()[3]
