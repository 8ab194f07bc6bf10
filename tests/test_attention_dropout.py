"""Attention that drops is torch's, in whatever way a batch is given: padded, packed, or as a tree."""

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from test_batching import batching, found, lines_of, rows
from torch import Tensor, nn
from training import a_base, a_config, numbers, on_cpu, one_thread, some_data  # noqa: F401  (fixtures)
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, DataCollatorWithFlattening

import fastlora
from fastlora import packing
from fastlora.batching import POSITIONS, UNPADDED
from fastlora.config import TrainConfig
from fastlora.data.rows import collate
from fastlora.language_model_loss import LanguageModelLoss
from fastlora.train import train

SIZES = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NONE = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "hidden_dropout": 0.0, "hidden_dropout_prob": 0.0, "resid_dropout": 0.0}
KINDS = {
    "llama": "attention_dropout",
    "gpt2": "attn_pdrop",
    "gpt_neox": "attention_dropout",
    "gpt_neo": "attention_dropout",
    "falcon": "attention_dropout",
    "opt": "attention_dropout",
    "bert": "attention_probs_dropout_prob",
}
"""What each kind of configuration calls the dropout of its attention."""


def small(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    more = {
        "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
        "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    }
    taken = {name: value for name, value in NONE.items() if hasattr(CONFIG_MAPPING[kind](), name)}
    config = CONFIG_MAPPING[kind](**{**SIZES, "intermediate_size": 48, **taken, **more.get(kind, {}), **options})
    return (AutoModel if kind == "bert" else AutoModelForCausalLM).from_config(config)


@pytest.mark.parametrize("kind", KINDS)
def test_who_drops_is_seen_by_what_each_kind_calls_it(kind: str) -> None:
    assert not packing.attention_drops(small(kind, **{KINDS[kind]: 0.0}).train())
    model = small(kind, **{KINDS[kind]: 0.1})
    assert packing.attention_drops(model.train()) and packing.keeps_padding(model)
    assert not packing.attention_drops(model.eval()) and not packing.keeps_padding(model)


class OneAttention(nn.Module):
    def __init__(self, **values: Any) -> None:
        super().__init__()
        for name, value in values.items():
            setattr(self, name, value)


class OneMLP(OneAttention):
    pass


@pytest.mark.parametrize("name", packing.KEPT_DROPOUTS)
def test_an_attention_keeps_it_as_a_number_or_a_module(name: str) -> None:
    for value, drops in ((0.1, True), (1, True), (0.0, False), (None, False), ("0.1", False)):
        assert packing.attention_drops(nn.Sequential(OneAttention(**{name: value}))) is drops
    assert packing.attention_drops(OneAttention(**{name: nn.Dropout(0.1)}))
    assert not packing.attention_drops(OneAttention(**{name: nn.Dropout(0.0)}))
    assert not packing.attention_drops(OneMLP(**{name: 0.1}))


def test_whose_mode_and_whose_configuration_count() -> None:
    """The attention's own: that of a model of several parts says nothing of its text."""
    model = nn.Sequential(OneAttention(dropout=0.1)).train()
    model[0].eval()
    assert not packing.attention_drops(model)
    model.eval()
    model[0].train()
    assert packing.attention_drops(model)
    for name in packing.DROPOUTS:
        assert packing.attention_drops(OneAttention(config=SimpleNamespace(**{name: 0.1})))
    assert not packing.attention_drops(OneAttention(config=SimpleNamespace(dropout=0.1)))


def adapted(drops: float = 0.1) -> Any:
    """A Llama with a random adapter, in training."""
    model = small("llama", num_key_value_heads=2, attention_dropout=drops)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(model, lora).train()


def drawn(model: Any, seed: int = 1, **given: Any) -> Any:
    torch.manual_seed(seed)
    return model(**given).loss


def told(model: nn.Module) -> list[tuple[str, str]]:
    return [(line.implementation, line.reason) for line in fastlora.report(model) if "LlamaAttention" in line.name]


def test_a_padded_batch_keeps_its_padding_and_torchs_dropout() -> None:
    """The masks are the plain model's, and so are loss and gradients; in evaluation padding is left out as of any model."""
    batch = collate(rows(), 0)
    plain = adapted()
    ours = fastlora.accelerate(copy.deepcopy(plain), loss=True, fuse=True)
    loss, theirs = drawn(ours, **batch), drawn(plain, **batch)
    torch.testing.assert_close(loss, theirs, rtol=1e-5, atol=0)
    assert drawn(ours, 2, **batch) != loss  # it does drop
    loss = drawn(ours, **batch)
    assert told(ours) == [("transformers", "its own forward: attention has dropout")]
    gradients = found(plain, theirs)
    for name, value in found(ours, loss).items():
        torch.testing.assert_close(value, gradients[name], rtol=1e-3, atol=1e-5)


def test_a_loop_of_ones_own_does_the_same() -> None:
    batch = collate(rows(), 0)
    plain = adapted()
    loss = LanguageModelLoss(fastlora.accelerate(copy.deepcopy(plain), frozen=True, fuse=True))
    counted = int((batch["labels"][:, 1:] != -100).sum())
    torch.manual_seed(1)
    torch.testing.assert_close(loss(batch) / counted, drawn(plain, **batch), rtol=1e-5, atol=0)
    assert loss.packs and not loss.leaves_padding
    torch.manual_seed(1)
    torch.testing.assert_close(loss.by_token(batch).mean(), drawn(plain, **batch), rtol=1e-5, atol=0)
    loss.model.eval()
    assert loss.leaves_padding
    torch.testing.assert_close(loss(batch) / counted, plain.eval()(**batch).loss, rtol=1e-5, atol=0)


def test_packed_rows_lie_in_lines_that_transformers_masks(tmp_path: Path) -> None:
    model = fastlora.accelerate(adapted(), frozen=True, fuse=True)
    given = batching(model, tmp_path)
    batch = given(lines_of(given.config))
    assert given.way == POSITIONS and given.loss(batch).isfinite()
    assert told(model) == [("transformers", "its own forward: attention has dropout")]
    without = batching(fastlora.accelerate(adapted(0.0), frozen=True, fuse=True), tmp_path)
    without(lines_of(without.config))
    assert without.way == UNPADDED


def test_rows_told_by_bounds_are_the_models_own_where_a_mask_says_the_same() -> None:
    """As a padding-free collator gives them: without a mask nothing would keep the rows apart, and it is refused by name."""
    lines = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": row.input_ids} for row in rows()])
    plain = adapted()
    ours = fastlora.accelerate(copy.deepcopy(plain), fuse=True)
    losses: list[Tensor] = [drawn(model, **lines, use_cache=False) for model in (ours, plain)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
    with pytest.raises(ValueError, match="^cu_seq_lens_q: .*attention has dropout"):
        drawn(ours, **lines)  # with a cache, transformers makes no mask
    for model in (ours, plain):
        model.eval()
    torch.testing.assert_close(*(drawn(model, **lines, use_cache=False) for model in (ours, plain)))


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_training_of_such_a_model(config: TrainConfig, tmp_path: Path, packing: bool) -> None:
    """With fastlora's attention it is the training without."""
    base = tiny.save_model(tmp_path / "base", attention_dropout=0.2)
    options = {"lora_dropout": 0.0, "max_steps": 2, "packing": packing, "max_length": 64, "batch_size": 4}
    config = replace(config, model=base, **options)
    train(config, progress=False)
    train(replace(config, output=tmp_path / "plain", accelerate=False), progress=False)
    for ours, plain in zip(numbers(config.output), numbers(tmp_path / "plain"), strict=True):
        assert abs(ours[1] - plain[1]) <= 1e-4 * plain[1]
