"""What accelerated soft prompts leave to PEFT: files, classes, adapters, pickles; what `report` says, and `restore` undoes."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, TrainableTokensConfig, get_peft_model
from prompted_models import FAMILIES, METHODS, VOCABULARY, llama, prompted, tasks_of
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertForQuestionAnswering,
    Trainer,
    TrainingArguments,
)

import fastlora
from fastlora import fusion
from fastlora.demo import BASE_MODEL
from fastlora.language_model_loss import LanguageModelLoss
from fastlora.peft import ensemble, prompts

IDS = torch.randint(5, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(3))
RIGHT = torch.tensor([[1] * 7 + [0] * 4, [1] * 11, [1] * 9 + [0] * 2])
LABELS = IDS.masked_fill(RIGHT == 0, -100)
GIVEN = {"input_ids": IDS, "attention_mask": RIGHT, "labels": LABELS}


def told(model: nn.Module) -> tuple[str, str]:
    (entry,) = [entry for entry in fastlora.report(model) if entry.name == "prompt"]
    return entry.implementation, entry.reason


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_files_are_pefts(family: str, method: str, tmp_path: Path) -> None:
    """What an accelerated model has trained and saved, plain PEFT loads, and gives the same; and the other way round."""
    model = fastlora.accelerate(prompted(method, family, torch.float32), loss=True)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.01)
    first = model(**GIVEN, **tasks_of(method)).loss
    first.backward()
    optimizer.step()
    assert model(**GIVEN, **tasks_of(method)).loss < first
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    plain = PeftModel.from_pretrained(prompted(method, family, torch.float32).base_model, tmp_path).eval()
    again = fastlora.accelerate(
        PeftModel.from_pretrained(prompted(method, family, torch.float32).base_model, tmp_path)
    ).eval()
    real = RIGHT == 1
    with torch.no_grad():
        expected = model.eval()(**GIVEN, **tasks_of(method)).logits[real]
        own = plain(input_ids=IDS, attention_mask=RIGHT, **tasks_of(method)).logits[:, -11:][real]
        assert torch.allclose(own, expected, rtol=1e-3, atol=1e-3)
        found = again(**GIVEN, **tasks_of(method)).logits[real]
        assert torch.allclose(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_everything_is_as_it_was_after_restoring(method: str) -> None:
    model, plain = prompted(method), prompted(method)
    assert fastlora.accelerate(model, fuse=True, frozen=True, loss=True) is model
    assert type(model) is not PeftModelForCausalLM and isinstance(model, PeftModelForCausalLM)
    assert type(model).__name__ == "PeftModelForCausalLM"
    assert model.state_dict().keys() == plain.state_dict().keys()
    model(**GIVEN, **tasks_of(method))
    fastlora.accelerate(model)
    fastlora.restore(model)
    assert [type(one) for one in model.modules()] == [type(one) for one in plain.modules()]
    for one in model.modules():
        assert not any(name.startswith("_fastlora") for name in one.__dict__), one.__dict__.keys()
    given = {"input_ids": IDS, "attention_mask": RIGHT}
    assert torch.equal(model(**given, **tasks_of(method)).logits, plain(**given, **tasks_of(method)).logits)


@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
def test_copies_and_pickles(method: str) -> None:
    model = fastlora.accelerate(prompted(method).eval())
    with torch.no_grad():
        logits = model(**GIVEN).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other) is type(model) and torch.equal(other(**GIVEN).logits, logits)
            fastlora.restore(other)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    assert torch.allclose(model(**GIVEN).logits[RIGHT == 1], logits[RIGHT == 1])


def test_what_is_told() -> None:
    model = prompted("prompt tuning", dtype=torch.float32)
    fastlora.accelerate(model)
    assert told(model) == ("apart", "not called yet, unless compiled")
    model(**GIVEN)
    assert told(model) == ("tree", "1 prompt, run once for all rows; 34 tokens run")
    with torch.no_grad():
        model.eval()(**GIVEN)
    assert told(model) == ("tree", "1 prompt, given as keys and values; 30 tokens run")
    model(**GIVEN, output_attentions=True)
    assert told(model) == ("apart", "each row has its prompt for itself: output_attentions was given")
    assert not [entry for entry in fastlora.report(model) if "RMSNorm" in entry.name]  # nothing was fused


def test_nothing_else_of_the_attention_is_touched() -> None:
    """Without `fuse`, what attends to other batches is transformers', to the last bit."""
    model, plain = (prompted("prompt tuning", dtype=torch.float32) for _ in range(2))
    fastlora.accelerate(model)
    assert not fusion.describe(model)
    assert torch.equal(model.base_model(IDS).logits, plain.base_model(IDS).logits)
    fastlora.accelerate(model, fuse=True)
    assert len(fusion.describe(model)) == 3


def test_a_model_that_allows_no_shared_prompt() -> None:
    model, plain = (prompted("prompt tuning") for _ in range(2))
    for one in (model, plain):
        one.base_model.lm_head.register_forward_hook(lambda module, args, out: out + out.mean(1, keepdim=True))
    fastlora.accelerate(model)
    out, own = model(**GIVEN), plain(**GIVEN)
    assert told(model)[0] == "apart" and "logits are others" in told(model)[1]
    assert torch.allclose(out.logits[1], own.logits[1, 5:])


def test_other_adapters_of_peft_are_left_alone() -> None:
    """Trainable tokens have layers of their own; LoRA beside them is fused."""
    base = llama()
    tokens = get_peft_model(
        copy.deepcopy(base), TrainableTokensConfig(token_indices=[7, 8], target_modules=["embed_tokens"])
    )
    plain = copy.deepcopy(tokens)
    fastlora.accelerate(tokens, loss=True, fuse=True, frozen=True, share_prefix=True)
    both = get_peft_model(
        base, LoraConfig(r=4, target_modules="all-linear", trainable_token_indices={"embed_tokens": [7, 8]})
    )
    other = copy.deepcopy(both)
    fastlora.accelerate(both, loss=True, fuse=True, frozen=True, share_prefix=True)
    for ours, theirs in ((tokens, plain), (both, other)):
        given = {**GIVEN, "input_ids": IDS.clamp(max=8)}
        losses = [one.train()(**given).loss for one in (ours, theirs)]
        assert torch.allclose(*losses)
        for loss in losses:
            loss.backward()
        for (name, one), its in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            if its.grad is not None:
                assert torch.allclose(one.grad, its.grad, atol=1e-5), name


@pytest.mark.parametrize("method", ["prompt tuning", "P-tuning", "prefix tuning"])
def test_compiled(method: str) -> None:
    """What torch compiles has each row's prompt for itself."""
    model = fastlora.accelerate(prompted(method, dtype=torch.float32))
    expected = model(**GIVEN)
    for layer in model.base_model.model.layers:
        layer.compile(backend="eager")
    out = model(**GIVEN)
    assert told(model)[0] == "apart" and "torch.compile" in told(model)[1]
    assert torch.allclose(out.logits[RIGHT == 1], expected.logits[RIGHT == 1], rtol=1e-4, atol=1e-4)
    assert torch.allclose(out.loss, expected.loss)


@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
def test_trainer(method: str, tmp_path: Path) -> None:
    """The same losses as by the model of nobody's, whose batches are padded at the right."""
    rows = [{name: value[row] for name, value in GIVEN.items()} for row in range(3)] * 4
    losses: list[list[Any]] = []
    for accelerated in (True, False):
        model = prompted(method, dtype=torch.float32)
        if accelerated:
            fastlora.accelerate(model, loss=True, fuse=True)
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=3, logging_steps=1, report_to=[], use_cpu=True,
            save_strategy="no", learning_rate=0.01, gradient_checkpointing=accelerated and method == "prompt tuning",
            disable_tqdm=True, seed=1,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert torch.allclose(*map(torch.tensor, losses), rtol=1e-3) and losses[0][-1] != losses[0][0]


@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
def test_trl(method: str, tmp_path: Path) -> None:
    """Its fused head gets the rows that share a prompt; texts that it packs give the losses of a padded batch."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizer = AutoTokenizer.from_pretrained(BASE_MODEL)
    rows = [{"prompt": "a b c " * n, "completion": "d e f"} for n in range(1, 9)]
    losses = []
    for packs, accelerated in ((False, False), (False, True), (True, True)):
        torch.manual_seed(0)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(BASE_MODEL), METHODS[method]())
        if accelerated:
            fastlora.accelerate(model, loss=True, fuse=True)
        arguments = trl.SFTConfig(
            output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, logging_steps=1, report_to=[], use_cpu=True, bf16=False,
            save_strategy="no", learning_rate=0.01, disable_tqdm=True, seed=1, padding_free=packs, max_length=None,
            gradient_checkpointing=accelerated,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model=model, args=arguments, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
        )
        trainer.train()
        losses.append(torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
        if accelerated:
            assert told(model)[0] == "tree"
    assert torch.allclose(losses[0], losses[1], rtol=5e-3) and torch.allclose(losses[1], losses[2], rtol=1e-4)


PATHS = {"tree": "fused", "mask": "fused", "apart": "all"}


@pytest.mark.parametrize("way", PATHS)
@pytest.mark.parametrize("method", [method for method in METHODS if method != "multitask prompts"])
def test_the_loss_of_the_training_loop(method: str, way: str) -> None:
    """`LanguageModelLoss` finds the labelled tokens where they stand."""
    model = fastlora.accelerate(prompted(method, dtype=torch.float32), fuse=True, loss=True)
    if way == "mask":
        model.base_model.set_attn_implementation("eager")
    elif way == "apart":
        model.__dict__[prompts.KEY].ways = {False: [], True: []}
    left = {
        name: torch.stack([row.roll(int((RIGHT[i] == 0).sum())) for i, row in enumerate(one)])
        for name, one in GIVEN.items()
    }
    left["labels"][torch.arange(3), (RIGHT == 0).sum(1)] = -100  # no token stands before a row's first
    total = LanguageModelLoss(model)
    loss = total(left)
    loss.backward()
    ours = [one.grad.clone() for one in model.parameters() if one.grad is not None]
    assert total.path == PATHS[way], total.reason
    model.zero_grad()
    logits = model(**{name: value for name, value in left.items() if name != "labels"}).logits
    labels = torch.nn.functional.pad(left["labels"][:, 1:], (0, 1), value=-100)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-4) and told(model)[0] == way
    for one, other in zip(ours, [one.grad for one in model.parameters() if one.grad is not None], strict=True):
        assert (one - other).abs().max() <= 1e-3 * other.abs().max()


def test_mixed_precision() -> None:
    model, plain = (prompted("prompt tuning", dtype=torch.float32) for _ in range(2))
    fastlora.accelerate(model)
    exact = plain(input_ids=IDS, attention_mask=RIGHT).logits[:, 5:][RIGHT == 1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = model(**GIVEN)
        own = plain(input_ids=IDS, attention_mask=RIGHT).logits[:, 5:][RIGHT == 1]
    error = (ours.logits[RIGHT == 1].float() - exact).norm()
    assert error <= 2 * (own.float() - exact).norm()
    ours.loss.backward()
    grad: Tensor = model.prompt_encoder["default"].embedding.weight.grad
    assert grad.dtype == torch.float32 and bool(grad.isfinite().all()) and bool((grad != 0).any())


@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
def test_an_ensemble(method: str) -> None:
    model = prompted(method)
    torch.manual_seed(5)
    model.add_adapter("second", METHODS[method](num_virtual_tokens=3))
    fastlora.accelerate(model.double().eval())
    batch = {"input_ids": IDS, "attention_mask": RIGHT}
    with torch.no_grad():
        found = ensemble(model, ["default", "second", "__base__"], **batch)
        each = [
            model(**batch, adapter_names=[name] * 3).logits.softmax(-1) for name in ("default", "second", "__base__")
        ]
    expected = torch.stack(each).mean(0)
    assert torch.allclose(found.exp()[RIGHT == 1], expected[RIGHT == 1], rtol=1e-4)
    with pytest.raises(ValueError, match="adapter_names"):
        ensemble(model, [], **batch)


def test_attention_dropout_under_autocast() -> None:
    """The mask is cast with what it masks."""
    model = fastlora.accelerate(prompted("prompt tuning", dtype=torch.float32, attention_dropout=0.1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**GIVEN)
    out.loss.backward()
    assert told(model)[0] == "mask" and bool(out.logits[RIGHT == 1].isfinite().all())
    assert bool((model.prompt_encoder["default"].embedding.weight.grad != 0).any())


def test_classes_that_are_left_to_peft() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = BertForQuestionAnswering(BertConfig(**sizes, vocab_size=VOCABULARY))
    model = get_peft_model(base, METHODS["prompt tuning"](task_type="QUESTION_ANS"))
    kind = type(model)
    with pytest.warns(UserWarning, match="PeftModelForQuestionAnswering to PEFT"):
        fastlora.accelerate(model)
    assert type(model) is kind


def test_only_prompts_are_taken() -> None:
    assert prompts.is_prompted(prompted("prompt tuning"))
    assert not prompts.is_prompted(get_peft_model(llama(), LoraConfig(target_modules="all-linear")))
    with pytest.raises(ValueError, match="LoRA"):
        fastlora.accelerate(llama())
