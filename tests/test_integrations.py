"""What other trainers are given: the callback, in a transformers Trainer, and axolotl's plugin, derived from a stand-in of axolotl's class."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch
from peft_models import peft_model
from transformers import Trainer, TrainingArguments

import fastlora
from fastlora.integrations import AccelerateCallback

pytestmark = pytest.mark.filterwarnings("ignore")


def train(folder: Path, callbacks: list) -> tuple[list[float], object]:
    torch.manual_seed(0)
    model, *_ = peft_model()
    ids = torch.randint(5, 90, (16, 11), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(folder), max_steps=4, logging_steps=1, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True
    )
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], model


def test_the_callback_accelerates_what_the_trainer_has(tmp_path: Path) -> None:
    with tiny.on_cpu():
        expected, plain = train(tmp_path / "plain", [])
        got, model = train(tmp_path / "ours", [AccelerateCallback(loss=True)])
    assert got == pytest.approx(expected, rel=1e-5)
    assert {line.implementation for line in fastlora.report(plain)} == {"peft"}
    lines = fastlora.report(model)
    assert "peft" not in {line.implementation for line in lines} and any(line.name.endswith("loss") for line in lines)


def test_an_option_that_accelerate_has_not_is_refused_as_training_begins(tmp_path: Path) -> None:
    with tiny.on_cpu(), pytest.raises(TypeError, match="fastest"):
        train(tmp_path, [AccelerateCallback(fastest=True)])


def test_axolotls_plugin_accelerates_the_loaded_model(monkeypatch: pytest.MonkeyPatch) -> None:
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = type("BasePlugin", (), {"post_model_load": lambda self, cfg, model: None})
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, "fastlora.integrations.axolotl", raising=False)
    plugin = importlib.import_module("fastlora.integrations.axolotl").FastloraPlugin()
    monkeypatch.delitem(sys.modules, "fastlora.integrations.axolotl")
    model, *_ = peft_model()
    plugin.post_model_load(None, model)
    assert isinstance(plugin, base.BasePlugin)
    assert "peft" not in {line.implementation for line in fastlora.report(model)}
