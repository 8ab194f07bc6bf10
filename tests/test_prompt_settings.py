"""Soft prompts of PEFT's, accelerated, in every setting: each text's logits, loss and gradients are those of that text alone, unpadded."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import prompted_models
import pytest
import torch
from prompted_models import IGNORE, METHODS, VOCABULARY, P, alone, loss_alone, prompted, tasks_of
from torch import Tensor

import fastlora
from fastlora.peft import prompts

TEXTS = [torch.randint(5, VOCABULARY - 1, (n,), generator=torch.Generator().manual_seed(n)) for n in (7, 11, 9)]
LABELS = [torch.where(torch.arange(len(text)) % 5 == 3, IGNORE, text) for text in TEXTS]
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-5, torch.bfloat16: 0.1}  # Llama's norms are float32 in any model


class Layout(NamedTuple):
    """A batch of the texts, and where they lie in it."""

    given: dict[str, Tensor]
    where: list[tuple[int, Tensor]]  # of each text its row, and its tokens' columns


def lay_out(columns: list[Tensor], width: int, rows: list[int]) -> Layout:
    count = max(rows) + 1
    ids, mask = torch.zeros(count, width, dtype=torch.long), torch.zeros(count, width, dtype=torch.long)
    labels = torch.full((count, width), IGNORE)
    for row, column, text, label in zip(rows, columns, TEXTS, LABELS, strict=True):
        ids[row, column], mask[row, column], labels[row, column] = text, 1, label
    return Layout({"input_ids": ids, "attention_mask": mask, "labels": labels}, list(zip(rows, columns, strict=True)))


def padded(*firsts: int) -> Layout:
    columns = [torch.arange(len(text)) + first for text, first in zip(TEXTS, firsts, strict=True)]
    return lay_out(columns, 12, [0, 1, 2])


def with_a_hole() -> Layout:
    columns = [torch.arange(7), torch.arange(11), torch.tensor([0, 1, 2, 3, 6, 7, 8, 9, 11])]
    return lay_out(columns, 12, [0, 1, 2])


def packed() -> Layout:
    lengths = [len(text) for text in TEXTS]
    firsts = [0, 7, 18]
    layout = lay_out([torch.arange(n) + first for n, first in zip(lengths, firsts, strict=True)], 27, [0, 0, 0])
    del layout.given["attention_mask"]
    layout.given["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
    return layout


def with_positions() -> Layout:
    layout = padded(5, 1, 3)
    mask = layout.given["attention_mask"]
    layout.given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return layout


LAYOUTS: dict[str, Callable[[], Layout]] = {
    "padding at the left": lambda: padded(5, 1, 3),
    "padding at the right": lambda: padded(0, 0, 0),
    "padding at both sides": lambda: padded(2, 1, 3),
    "a hole in the mask": with_a_hole,
    "position_ids": with_positions,
    "packed texts": packed,
}


def eager(model: Any) -> None:
    model.base_model.set_attn_implementation("eager")


def apart(model: Any) -> None:
    model.__dict__[prompts.KEY].ways = {False: [], True: []}


def checkpointing(model: Any) -> None:
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()


class Setting(NamedTuple):
    layout: str = "padding at the left"
    change: Callable[[Any], None] = lambda model: None
    options: dict[str, Any] = {}
    way: str = "tree"
    dtype: torch.dtype = torch.float64
    trains: bool = True


SETTINGS = {
    **{name: Setting(name) for name in LAYOUTS},
    "at inference": Setting(trains=False),
    "packed texts at inference": Setting("packed texts", trains=False),
    "gradient checkpointing": Setting(change=checkpointing),
    "eager attention": Setting(change=eager, way="mask"),
    "eager attention at inference": Setting(change=eager, way="mask", trains=False),
    **{f"each row for itself, {name}": Setting(name, change=apart, way="apart") for name in LAYOUTS},
    "loss=True": Setting(options={"loss": True}),
    "loss=True, packed texts": Setting("packed texts", options={"loss": True}),
    "fuse=True, frozen=True": Setting(options={"fuse": True, "frozen": True}),
    "float32": Setting(dtype=torch.float32, options={"fuse": True, "frozen": True, "loss": True}),
    "bfloat16": Setting(dtype=torch.bfloat16),
}


def assert_near(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    assert found.isfinite().all(), what
    error = (found.double() - expected.double()).abs().max().item()
    assert error <= TOLERANCE[dtype] * expected.double().abs().max().item(), f"{what}: {error:.3g}"


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", prompted_models.FAMILIES)
def test_each_text_is_as_it_were_alone(family: str, method: str, setting: str) -> None:
    layout, change, options, way, dtype, trains = SETTINGS[setting]
    model, plain = prompted(method, family, dtype), prompted(method, family, dtype)
    fastlora.accelerate(model, **options)
    change(model)
    given, where = LAYOUTS[layout]()
    tasks = {} if "packed" in layout else tasks_of(method)
    if "packed" in layout and method == "multitask prompts":
        tasks = {"task_ids": torch.tensor([2])}
    of_text = tasks.get("task_ids", torch.zeros(3)).expand(3).tolist()
    expected = [alone(plain.train(trains), method, text, int(task)) for text, task in zip(TEXTS, of_text, strict=True)]
    with torch.set_grad_enabled(trains):
        out = model.train(trains)(**given, **tasks)
    state = model.__dict__[prompts.KEY]
    assert state.last[0] == way, state.last
    totals = [loss_alone(logits, label.clone()) for logits, label in zip(expected, LABELS, strict=True)]
    loss = sum(total for total, _ in totals) / sum(count for _, count in totals)
    assert_near(out.loss, loss, max(dtype, torch.float32, key=lambda one: TOLERANCE[one]), "loss")
    if out.logits is not None:
        assert out.logits.shape == (*given["input_ids"].shape, VOCABULARY)
        for (row, columns), logits in zip(where, expected, strict=True):
            assert_near(out.logits[row, columns], logits[1:], dtype, "logits")
    if trains:
        drawn = [torch.randn(logits[1:].shape, dtype=dtype) for logits in expected]
        if out.logits is None or dtype == torch.bfloat16:
            out.loss.backward()
            loss.backward()
        else:
            pairs = zip(where, drawn, strict=True)
            torch.stack([(out.logits[row, columns] * one).sum() for (row, columns), one in pairs]).sum().backward()
            torch.stack([(one[1:] * other).sum() for one, other in zip(expected, drawn, strict=True)]).sum().backward()
        coarse = torch.float32 if out.logits is None and dtype == torch.float64 else dtype  # transformers' own loss
        for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
            if other.grad is not None and other.grad.any():
                assert_near(one.grad, other.grad, coarse, name)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
def test_a_prompt_before_what_rows_begin_with(method: str, inference: bool) -> None:
    """`share_prefix` runs that once, too."""
    model, plain = prompted(method), prompted(method)
    fastlora.accelerate(model, share_prefix=True)
    template = torch.randint(5, VOCABULARY, (10,), generator=torch.Generator().manual_seed(7))
    texts = [torch.cat((template, text)) for text in TEXTS]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    labels = torch.where((mask == 1) & (torch.arange(ids.shape[1]) > 10), ids, IGNORE)
    with torch.set_grad_enabled(not inference):
        out = model.train(not inference)(input_ids=ids, attention_mask=mask, labels=labels)
    prompt = 0 if inference or method in prompted_models.KEYED else P
    assert f"{prompt + 10 + 27} tokens run" in model.__dict__[prompts.KEY].last[1]
    expected = [alone(plain.train(not inference), method, text) for text in texts]
    for row, logits in enumerate(expected):
        assert_near(out.logits[row, : len(logits) - 1], logits[1:], torch.float64, "logits")
    pairs = zip(expected, labels, texts, strict=True)
    totals = [loss_alone(logits, label[: len(text)].clone()) for logits, label, text in pairs]
    assert_near(out.loss, sum(one for one, _ in totals) / sum(count for _, count in totals), torch.float32, "loss")


def with_more_adapters(method: str, family: str) -> Any:
    model = prompted(method, family)
    torch.manual_seed(5)
    for name, length in (("longer", P + 3), ("shorter", 2)):
        model.add_adapter(
            name,
            METHODS[method](num_virtual_tokens=length, **({"num_frozen_tokens": 0} if method == "cartridge" else {})),
        )
    return model.double()


OWN = {"default": 1, "longer": 0, "__base__": 2}
OWN_OTHERWISE = {"shorter": 0, "longer": 1, "default": 2}


@pytest.mark.parametrize("own", [OWN, OWN_OTHERWISE], ids=["a row without", "three lengths"])
@pytest.mark.parametrize("how", ["in training", "at inference", "each row for itself", "eager attention"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", prompted_models.FAMILIES)
def test_each_row_has_its_own_prompt(family: str, method: str, how: str, own: dict[str, int]) -> None:
    model = with_more_adapters(method, family)
    plain = copy.deepcopy(model)
    fastlora.accelerate(model)
    if how == "eager attention":
        eager(model)
    elif how == "each row for itself":
        apart(model)
    given, where = padded(5, 1, 3)
    trains = how != "at inference"
    names = [name for name, _ in sorted(own.items(), key=lambda one: one[1])]
    with torch.set_grad_enabled(trains):
        out = model.train(trains)(**given, adapter_names=names, **tasks_of(method))
    total = torch.zeros((), dtype=torch.float64)
    ours = torch.zeros((), dtype=torch.float64)
    for number, (name, text) in enumerate(zip(names, TEXTS, strict=True)):
        row, columns = where[number]
        if name == "__base__":
            expected = plain.base_model(input_ids=text[None]).logits[0]
        else:
            plain.set_adapter(name)
            expected = alone(plain.train(trains), method, text, int(prompted_models.TASKS[number]))[1:]
        assert_near(out.logits[row, columns], expected, torch.float64, name)
        total, ours = total + expected.square().sum(), ours + out.logits[row, columns].square().sum()
    if trains:
        total.backward()
        ours.backward()
        for (name, one), other in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            if other[1].grad is not None and other[1].grad.any():
                assert_near(one.grad, other[1].grad, torch.float64, name)


@pytest.mark.parametrize("method", METHODS)
def test_embeddings_in_the_place_of_tokens(method: str) -> None:
    model = fastlora.accelerate(prompted(method))
    given, _ = padded(5, 1, 3)
    by_tokens = model(**given, **tasks_of(method)).logits
    embeds = model.word_embeddings(given.pop("input_ids"))
    assert torch.equal(model(inputs_embeds=embeds, **given, **tasks_of(method)).logits, by_tokens)


@pytest.mark.parametrize("way", ["tree", "apart"])
@pytest.mark.parametrize("method", ["prompt tuning", "prefix tuning"])
def test_the_last_logits_alone(method: str, way: str) -> None:
    model = fastlora.accelerate(prompted(method))
    if way == "apart":
        apart(model)
    given, _ = padded(5, 1, 3)
    del given["labels"]
    every = model(**given).logits
    for kept in (1, 3, torch.tensor([11, 2])):
        columns = kept if isinstance(kept, Tensor) else slice(-kept, None)
        assert torch.allclose(model(**given, logits_to_keep=kept).logits, every[:, columns])
    assert len(model(**given, return_dict=False)) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_cache_goes_on(method: str) -> None:
    """As a caller's own loop has it: the mask is of all tokens so far, or left out."""
    model = fastlora.accelerate(prompted(method)).eval()
    given, where = padded(5, 1, 3)
    del given["labels"]
    tasks = tasks_of(method)
    with torch.no_grad():
        whole = model(**given, **tasks).logits
        first = {name: value[:, :8] for name, value in given.items()}
        begun = model(**first, **tasks, use_cache=True)
        rest = given["input_ids"][:, 8:]
        more = model(
            input_ids=rest, attention_mask=given["attention_mask"], past_key_values=begun.past_key_values, **tasks
        )
        for row, columns in where:
            found = torch.cat((begun.logits, more.logits), 1)[row, columns]
            assert_near(found, whole[row, columns], torch.float64, "logits")
        wrong = given["attention_mask"][:, :5]
        with pytest.raises(ValueError, match="attention_mask"):
            model(input_ids=rest, attention_mask=wrong, past_key_values=more.past_key_values, **tasks)


def test_a_kept_prompt_is_the_present_one() -> None:
    """Written to by whatever hand; and so is the model."""
    model = fastlora.accelerate(prompted("prompt tuning", dtype=torch.float32)).eval()
    given, _ = padded(0, 0, 0)

    def logits() -> Tensor:
        with torch.no_grad():
            found: Tensor = model(**given).logits
        fresh = copy.deepcopy(model)
        fresh.__dict__[prompts.KEY].kept.clear()
        with torch.no_grad():
            assert torch.equal(fresh(**given).logits, found)
        return found

    seen = [logits()]
    model.prompt_encoder["default"].embedding.weight.data[0] += 1
    seen.append(logits())
    with torch.no_grad():
        model.base_model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    seen.append(logits())
    model.base_model.model.layers[1].mlp.up_proj.weight.data.mul_(1.5)
    seen.append(logits())
    assert not any(torch.equal(a, b) for a, b in zip(seen, seen[1:], strict=False))


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"adapter_names": ["default"]}, "adapter_names"),
        ({"attention_mask": torch.ones(3, 4)}, "attention_mask"),
        ({"adapter_names": ["default", "other", "default"]}, "other"),
    ],
)
def test_wrong_arguments(given: dict[str, Any], word: str) -> None:
    model = fastlora.accelerate(prompted("prompt tuning"))
    with pytest.raises(ValueError, match=word):
        model(**{**padded(0, 0, 0).given, **given})
    with pytest.raises(ValueError, match="task_ids"):
        fastlora.accelerate(prompted("multitask prompts"))(**padded(0, 0, 0).given)


def test_a_prefix_and_checkpointing_need_attention_that_is_told() -> None:
    model = fastlora.accelerate(prompted("prefix tuning"))
    eager(model)
    checkpointing(model)
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        model(**padded(0, 0, 0).given)
