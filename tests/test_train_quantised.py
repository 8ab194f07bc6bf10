"""`fastlora train` with a base that is quantised as it is loaded."""

import importlib.util
import json
from dataclasses import replace

import pytest
import tiny
import torch
from training import (  # noqa: F401  (fixtures)
    a_base,
    a_config,
    adapter,
    numbers,
    on_cpu,
    one_thread,
    some_data,
)

from fastlora import models
from fastlora.config import TrainConfig
from fastlora.models import load_base, load_model
from fastlora.train import train

BITS = pytest.mark.parametrize("bits", [4, 8])
NEEDS_BITSANDBYTES = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="not installed: bitsandbytes"
)


@NEEDS_BITSANDBYTES
@BITS
def test_it_trains_by_fused_layers_and_resumes_to_the_same_bits(config, tmp_path, bits):
    config = replace(config, lora_dropout=0.1, save_steps=4, max_steps=8, **{f"load_in_{bits}bit": True})
    result = train(config, progress=False)
    assert result.loss < result.first_loss
    told = json.loads((config.output / "summary.json").read_text())["implementations"]
    assert set(told) == {"cpu"}, told
    expected, losses = adapter(config.output), numbers(config.output)
    train(replace(config, resume_from=4), progress=False)
    assert numbers(config.output) == losses
    assert all(torch.equal(value, expected[name]) for name, value in adapter(config.output).items())
    answering, _ = load_model(None, {"tuned": config.output})
    assert answering.active_adapters == ["tuned"]


METHODS = {
    "dora": {"r": 4},
    "prompt": {"num_virtual_tokens": 5},
    "prefix": {"num_virtual_tokens": 3},
    "ptuning": {"num_virtual_tokens": 5, "encoder_hidden_size": 16},
    "cartridge": {"num_virtual_tokens": 4},
    "ia3": {},
    "adapter": {"reduction_factor": 4},
    "norm": {},
    "tokens": {"token_indices": list(range(3, 300))},
}


@NEEDS_BITSANDBYTES
@BITS
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_a_quantised_base_and_resumes_to_the_same_bits(base, data, tmp_path, bits, method):
    given = {"max_steps": 4, "save_steps": 2, "batch_size": 4, "lr": 1e-2, f"load_in_{bits}bit": True}
    config = TrainConfig(model=base, data=data, output=tmp_path / "out", method=method, **given, **METHODS[method])
    result = train(config, progress=False)
    assert result.implementations["cpu"] == 15  # 14 quantised ones, and the head
    expected, losses = adapter(config.output), numbers(config.output)
    train(replace(config, resume_from=2), progress=False)
    assert numbers(config.output) == losses
    assert all(torch.equal(value, expected[name]) for name, value in adapter(config.output).items())


@NEEDS_BITSANDBYTES
def test_left_to_bitsandbytes_it_trains_as_well(data, tmp_path):
    """Its layers are asked in eval mode as the loss's path is chosen, which must not pack their weights. Their sizes are multiples of its blocks."""
    base = tiny.save_model(tmp_path / "base", hidden_size=64)
    given = {"max_steps": 2, "batch_size": 4, "lr": 1e-2, "load_in_4bit": True, "accelerate": False}
    losses = []
    for method in ("ia3", "adapter"):
        config = TrainConfig(model=base, data=data, output=tmp_path / method, method=method, **given)
        train(config, progress=False)
        ours = replace(config, output=tmp_path / f"{method} accelerated", accelerate=True)
        train(ours, progress=False)
        losses += zip(numbers(config.output), numbers(ours.output), strict=True)
    assert all(mine == pytest.approx(theirs, rel=1e-3) for (_, theirs, _), (_, mine, _) in losses)


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        ("full", "it trains parameters of the base, and saves it as a model"),
        ("bitfit", "it trains parameters of the base, and saves it as a model"),
    ],
)
@BITS
def test_what_takes_none_says_why(method, reason, bits):
    with pytest.raises(
        ValueError, match=f"^load_in_{bits}bit=True: method={method} takes no quantised base: {reason}$"
    ):
        TrainConfig(model="m", data="d", output="o", method=method, **{f"load_in_{bits}bit": True})


@NEEDS_BITSANDBYTES
@BITS
def test_the_linear_layers_are_quantised_and_lm_head_is_not(base, bits):
    model = load_base(str(base), torch.bfloat16, torch.device("cpu"), bits)
    kinds = {type(module).__name__ for name, module in model.named_modules() if name.endswith("_proj")}
    assert kinds == {"Linear4bit" if bits == 4 else "Linear8bitLt"}
    assert type(model.lm_head).__name__ == "Linear" and model.lm_head.weight.dtype is torch.bfloat16
    if bits == 4:
        state = model.model.layers[0].mlp.up_proj.weight.quant_state
        assert (state.quant_type, state.nested) == ("nf4", True)
        assert model.model.layers[0].mlp.up_proj.compute_dtype is torch.bfloat16


@BITS
def test_without_bitsandbytes_the_error_says_what_to_install(config, monkeypatch, bits):
    monkeypatch.setattr("transformers.utils.import_utils.is_bitsandbytes_available", lambda *_: False)
    with pytest.raises(ImportError, match=f"^load_in_{bits}bit=True: needs bitsandbytes .* pip install bitsandbytes"):
        train(replace(config, **{f"load_in_{bits}bit": True}), progress=False)
    assert not config.output.exists()
    with pytest.raises(ImportError):
        models.require_bitsandbytes(bits)
