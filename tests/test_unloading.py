"""A model that PEFT unloads or merges has nothing of fastlora's left in it."""

import copy
import pickle
import subprocess
import sys

import peft
import pytest
import torch
from packed_weights import held_bytes
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft_models import a_pair, llama, logits, peft_model  # noqa: F401  (a fixture)
from transformers import LlamaForCausalLM

import fastlora
from fastlora.peft import FrozenLinear


def test_merge_and_unload(pair):
    model, peer = pair
    expected = logits(peer)
    merged = model.merge_and_unload()
    assert not any(isinstance(module, lora.Linear) for module in merged.modules())
    assert torch.allclose(logits(merged), expected, atol=1e-5)


def add_modules_to_save(model, active):
    """After `accelerate`: PEFT wraps a swapped layer, and copies it."""
    model.add_adapter("head", LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    if active:
        model.set_adapter("head")
    return model


LOAD_PLAIN = """
import sys, torch
sys.modules["fastlora"] = None
model = torch.load(sys.argv[1], weights_only=False)
torch.save(model(input_ids=torch.arange(5, 16)[None]).logits.detach(), sys.argv[2])
"""
UNLOADING = {
    "unload": lambda model: model.unload(),
    "merge": lambda model: model.merge_and_unload(),
    "tuner": lambda model: model.base_model.merge_and_unload(safe_merge=True),
    "copy": lambda model: copy.copy(model).unload(),
    "no adapter": lambda model: model.delete_adapter("default") or model.unload(),
    "modules_to_save": lambda model: add_modules_to_save(model, active=True).unload(),
    "modules_to_save, inactive": lambda model: add_modules_to_save(model, active=False).merge_and_unload(),
}
IN_PART = ["unload", "merge", "tuner", "no adapter"]


@pytest.mark.parametrize(("how", "whole"), [*((how, True) for how in UNLOADING), *((how, False) for how in IN_PART)])
def test_an_unloaded_model_has_nothing_of_ours(how, whole):
    """Nor of the packed copies; be it the PEFT model that was accelerated, or the one within, from which no tuner is seen."""
    plain, model = (peft_model(target_modules=["q_proj", "k_proj"])[0] for _ in range(2))
    fastlora.accelerate(model if whole else model.base_model.model, frozen=True)
    logits(model)
    unloaded = []
    for each in (plain, model):
        torch.manual_seed(1)
        unloaded.append(UNLOADING[how](each))
    expected, found = unloaded
    assert torch.allclose(logits(found), logits(expected), atol=1e-5)
    assert [type(module) for module in found.modules()] == [type(module) for module in expected.modules()]
    assert b"fastlora" not in pickle.dumps(found) and b"fastlora" not in pickle.dumps(copy.deepcopy(found))
    assert held_bytes() == 0


def test_an_unloaded_model_lives_without_fastlora(tmp_path):
    model, _ = peft_model()
    fastlora.accelerate(model, frozen=True)
    merged = model.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(LlamaForCausalLM.from_pretrained(tmp_path / "saved")), logits(merged))
    torch.save(merged, tmp_path / "model.pt")
    script = tmp_path / "load.py"
    script.write_text(LOAD_PLAIN)
    command = [sys.executable, script, tmp_path / "model.pt", tmp_path / "logits.pt"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    expected = merged(input_ids=torch.arange(5, 16)[None]).logits
    assert torch.allclose(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5)


def test_another_tuners_model_is_unloaded_without_anything_of_ours():
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = fastlora.accelerate(get_peft_model(llama()[0], config), frozen=True)
    assert any(type(module) is FrozenLinear for module in model.modules())
    assert b"fastlora" not in pickle.dumps(model.merge_and_unload())
