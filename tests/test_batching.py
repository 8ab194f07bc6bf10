"""batching.py: in which way a model is given packed rows, that their logits and gradients are those of the rows alone, and who is refused."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from step_gradients import assert_a_step_within_bound
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import fastlora
from fastlora import reference
from fastlora.batching import BOUNDS, POSITIONS, UNPADDED, Batching
from fastlora.config import TrainConfig
from fastlora.data.rows import Row, collate
from fastlora.language_model_loss import IGNORE, LanguageModelLoss

CPU = torch.device("cpu")
WORDS = 40
LENGTHS = (9, 4, 7, 1, 5)  # in lines of 16: 9 + 7, 5 + 4 + 1


def rows() -> list[Row]:
    drawn = torch.Generator().manual_seed(2)
    found = []
    for number, length in enumerate(LENGTHS):
        ids = torch.randint(1, WORDS, (length,), generator=drawn).tolist()
        unlabelled = number % 3
        found.append(Row(ids, [IGNORE] * unlabelled + ids[unlabelled:]))
    return found


def lines_of(config: TrainConfig) -> list[Row]:
    from fastlora.data.lines import packed_batches

    ((batch,),) = packed_batches(rows(), config.max_length, config.max_tokens, 1)
    return batch


def batching(model: Any, tmp_path: Path, **options: Any) -> Batching:
    options = {"packing": True, "max_length": 16, "max_tokens": 32, **options}
    config = TrainConfig(model="m", data="d", output=tmp_path, **options)
    return Batching(config, model, LanguageModelLoss(model), 0, CPU)


def small(kind: str, **options: Any) -> Any:
    """A random model of a few thousand weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CONFIG_MAPPING[kind](**{**sizes, **options})
    return AutoModelForCausalLM.from_config(config).eval()


def with_lora(model: Any) -> Any:
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    return unzeroed(adapted)


def unzeroed(model: Any) -> Any:
    """No adapter at zero, where gradients are."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.train()


def found(model: Any, loss: Tensor) -> dict[str, Tensor]:
    """The loss, and its gradients by the parameters' names."""
    model.zero_grad()
    loss.backward()
    return {
        "loss": loss.detach(),
        **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }


def eager(model: Any) -> Tensor:
    """The summed loss by the model's own logits, padded."""
    batch = collate(rows(), 0)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    targets = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def check(make: Any, tmp_path: Path, way: str, accelerated: bool, **options: Any) -> Batching:
    """The loss and gradients of packed rows are those of the rows padded, within the bound of float64's."""
    model = make()
    exact_model = make().double()
    theirs, exact = (found(one, eager(one)) for one in (model, exact_model))
    if accelerated:
        fastlora.accelerate(model, frozen=True, fuse=True)
    given = batching(model, tmp_path, accelerate=accelerated, **options)
    loss = given.loss(given(lines_of(given.config)))
    assert given.way == way
    assert_a_step_within_bound(found(model, loss), theirs, exact)
    return given


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_are_the_rows_alone_by_transformers(attention: str, tmp_path: Path) -> None:
    given = check(lambda: with_lora(small("llama", attn_implementation=attention)), tmp_path, POSITIONS, False)
    batch = given(lines_of(given.config))
    assert batch.keys() == {"input_ids", "position_ids", "labels"} and batch["input_ids"].shape == (2, 16)


def test_packed_rows_are_the_rows_alone_by_our_attention(tmp_path: Path) -> None:
    given = check(lambda: with_lora(small("llama", num_key_value_heads=2)), tmp_path, UNPADDED, True)
    assert "attention_mask" in given(lines_of(given.config))


def test_in_float64_they_are_the_same_to_its_last_digits(tmp_path: Path) -> None:
    for accelerated in (False, True):
        model = with_lora(small("llama")).double()
        expected = found(model, eager(model))
        if accelerated:
            fastlora.accelerate(model, frozen=True, fuse=True)
        given = batching(model, tmp_path, accelerate=accelerated)
        loss = given.loss(given(lines_of(given.config)))
        for name, value in found(model, loss).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-13)


KINDS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_positions": 16, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "gpt_neox": {"intermediate_size": 48},
    "mistral": {"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 3},
    "gemma3_text": {"intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": 3, "head_dim": 8},
}


@pytest.mark.parametrize("kind", KINDS)
def test_positions_learnt_and_windows_are_exact(kind: str, tmp_path: Path) -> None:
    check(lambda: with_lora(small(kind, **KINDS[kind])), tmp_path, POSITIONS, False)
    model = with_lora(small(kind, **KINDS[kind]))
    fastlora.accelerate(model, frozen=True, fuse=True)
    given = batching(model, tmp_path)
    given(lines_of(given.config))
    assert given.way in (POSITIONS, UNPADDED)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 16}),
        ("bloom", {}),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32}),
        ("mamba", {"state_size": 4}),
    ],
)
def test_a_model_that_carries_more_from_token_to_token_is_refused(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = small(kind, **options)
    given = batching(model, tmp_path)
    with pytest.raises(
        ValueError, match=r"^packing=True: \w+ForCausalLM cannot do it: it gives rows that lie in one line"
    ):
        given(lines_of(given.config))


def test_an_encoder_is_refused_by_name(tmp_path: Path) -> None:
    given = batching(tiny.t5(), tmp_path)
    with pytest.raises(ValueError, match="^packing=True: T5ForConditionalGeneration cannot do it: it has an encoder"):
        given(rows())


@pytest.mark.parametrize("kind", ["prompt", "prefix", "ptuning"])
def test_each_packed_row_has_its_own_prompt_or_is_refused(kind: str, tmp_path: Path) -> None:
    of = {"prompt": PromptTuningConfig, "prefix": PrefixTuningConfig, "ptuning": PromptEncoderConfig}[kind]

    def make() -> Any:
        base = small("llama", num_key_value_heads=2)
        torch.manual_seed(1)
        return get_peft_model(base, of(num_virtual_tokens=3, task_type="CAUSAL_LM"))

    given = batching(make(), tmp_path, method=kind, accelerate=False)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot do it: .* accelerate=True puts one before each"):
        given(lines_of(given.config))
    model = make()
    fastlora.accelerate(model, frozen=True, fuse=True)
    given = batching(model, tmp_path, method=kind)
    loss = given.loss(given(lines_of(given.config)))
    assert given.way == POSITIONS
    packed, padded = found(model, loss), found(model, given.loss(collate(rows(), 0)))
    torch.testing.assert_close(packed["loss"], padded["loss"], rtol=1e-6, atol=0)
    for name, value in padded.items():
        torch.testing.assert_close(packed[name], value, rtol=1e-4, atol=1e-6)


def test_compiled_layers_are_given_lines(tmp_path: Path) -> None:
    """What torch has compiled runs the model's own attention."""
    model = with_lora(small("llama"))
    fastlora.accelerate(model, frozen=True, fuse=True)
    model.get_base_model().model.layers[0].compile(backend="eager")
    given = batching(model, tmp_path)
    loss = given.loss(given(lines_of(given.config)))
    assert given.way == POSITIONS
    torch.testing.assert_close(loss, given.loss(collate(rows(), 0)), rtol=1e-6, atol=0)


def test_flash_attention_is_told_the_bounds_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an attention in its place that needs no card."""
    seen: list[Any] = []

    def flash(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any) -> Any:
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"a mask of {mask.dim()} dimensions")
        B, H, T, D = query.shape
        starts = options.get("cu_seq_lens_q")
        seen.append((mask, starts, options.get("max_length_q")))
        assert starts is options.get("cu_seq_lens_k") and options.get("max_length_k") == options.get("max_length_q")
        starts = torch.arange(B + 1) * T if starts is None else starts.long()
        q, k, v = (one.transpose(1, 2).flatten(0, 1) for one in (query, key, value))
        return reference.attention(q, k, v, starts, D**-0.5, True)[0].view(B, T, H, D), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", flash)
    model = small("llama", num_key_value_heads=2).double()
    expected = eager(model)
    model.config._attn_implementation = "flash_attention_2"
    given = batching(model, tmp_path, accelerate=False)
    batch = given(lines_of(given.config))
    seen.clear()
    loss = given.loss(batch)
    assert given.way == BOUNDS and batch["input_ids"].shape == (1, sum(LENGTHS))
    (mask, starts, longest), *_ = seen
    assert mask is None and starts.tolist() == [0, 9, 16, 21, 25, 26] and starts.dtype == torch.int32 and longest == 9
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_without_packing_nothing_is_asked_of_the_model(tmp_path: Path) -> None:
    given = batching(object(), tmp_path, packing=False)
    assert given(rows())["input_ids"].tolist() == collate(rows(), 0)["input_ids"].tolist()
    assert given.way == "padded" and given.loss.path is None
