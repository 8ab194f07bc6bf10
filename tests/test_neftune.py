"""NEFTune's noise: as large as Jain et al. have it by each row's own length, drawn anew each step, and none outside of training."""

from dataclasses import replace

import pytest
import tiny
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from training import a_base, a_config, on_cpu, one_thread, records, some_data  # noqa: F401  (fixtures)

import fastlora
from fastlora import neftune, packing
from fastlora.language_model_loss import LanguageModelLoss
from fastlora.train import train

ALPHA = 5.0


def embedded(model, **given) -> torch.Tensor:
    """What the model's first layer is given."""
    seen = []
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    handle = base.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**given)
    handle.remove()
    return seen[0]


IDS = torch.arange(24).reshape(2, 12)
MASK = torch.tensor([[1] * 12, [1] * 3 + [0] * 9])


def test_a_row_has_noise_by_its_own_length_and_in_training_alone():
    model = tiny.llama()
    plain = embedded(model, input_ids=IDS, attention_mask=MASK)
    neftune.attach(model, ALPHA)
    assert torch.equal(embedded(model, input_ids=IDS, attention_mask=MASK), plain)
    model.train()
    noise = embedded(model, input_ids=IDS, attention_mask=MASK) - plain
    width = plain.shape[-1]
    for row, length in enumerate((12, 3)):
        most = ALPHA / (length * width) ** 0.5
        assert 0.9 * most <= noise[row, :length].abs().max() <= most * (1 + 1e-5)
        assert abs(noise[row, :length].mean()) < most / 2
    again = embedded(model, input_ids=IDS, attention_mask=MASK) - plain
    assert not torch.equal(again, noise)
    without_mask = embedded(model, input_ids=IDS) - plain
    assert without_mask.abs().max() <= ALPHA / (12 * width) ** 0.5 * (1 + 1e-5)
    model.eval()
    assert torch.equal(embedded(model, input_ids=IDS, attention_mask=MASK), plain)


def test_a_batch_without_its_padding_has_the_noise_of_its_rows():
    given = packing.pack({"input_ids": IDS, "attention_mask": MASK}, MASK.bool())
    assert neftune.lengths(given).tolist() == [[12.0] * 12 + [3.0] * 3]
    assert neftune.lengths({"input_ids": IDS, "attention_mask": MASK}).tolist() == [[12.0], [3.0]]
    assert neftune.lengths({"input_ids": IDS}).tolist() == [[12.0], [12.0]]
    places = torch.tensor([[*range(9), *range(3)], [*range(2), *range(2), *range(8)]])  # as lines have them
    assert neftune.lengths({"input_ids": IDS, "position_ids": places}).tolist() == [
        [9.0] * 9 + [3.0] * 3,
        [2.0] * 4 + [8.0] * 8,
    ]


@pytest.mark.parametrize(
    "config",
    [LoraConfig(target_modules="all-linear"), PromptTuningConfig(num_virtual_tokens=4)],
    ids=["lora", "prompt"],
)
def test_every_kind_of_model_is_disturbed_where_its_tokens_are(config):
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(tiny.llama(), config)
    fastlora.accelerate(model)
    neftune.attach(model, ALPHA)
    loss = LanguageModelLoss(model)
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS}
    model.eval()
    assert loss(batch) == loss(batch)
    model.train()
    found = {loss(batch).item() for _ in range(4)}
    assert len(found) == 4


def test_training_is_another_with_noise_and_its_checkpoints_are_the_plain_models(config):
    train(replace(config, max_steps=2), progress=False)
    noisy = replace(config, max_steps=2, output=config.output.parent / "noisy", neftune_noise_alpha=ALPHA)
    train(noisy, progress=False)
    plain, disturbed = records(config.output), records(noisy.output)
    assert plain[0]["loss"] != disturbed[0]["loss"] and abs(plain[0]["loss"] - disturbed[0]["loss"]) < plain[0]["loss"]
