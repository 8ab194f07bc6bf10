"""Adapter folders as PEFT saves them, and edits of what is in them."""

import json
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

Q = {"target_modules": ["q_proj"]}
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"


def save(folder: Path, make=tiny.llama, **options) -> Path:
    """An adapter with random values, saved by PEFT."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(make(), LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **options}))
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter.data, std=0.3)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(name="folder")
def a_folder(tmp_path):
    return save(tmp_path / "adapter", target_modules=["q_proj", "v_proj"])


def change(folder: Path, **values) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def tensors(edit):
    """An edit of the tensors by key."""

    def apply(folder: Path) -> None:
        file = folder / "adapter_model.safetensors"
        found = load_file(file)
        edit(found)
        save_file(found, file)

    return apply


def add_tensor(folder: Path, key: str, tensor: torch.Tensor) -> None:
    tensors(lambda found: found.update({key: tensor}))(folder)
