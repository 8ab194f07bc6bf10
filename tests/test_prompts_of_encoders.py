"""Accelerated soft prompts where the prompt sees the input, or the output is a row's: each text's values are those of that text alone, unpadded."""

import copy
import warnings
from typing import Any

import pytest
import torch
from peft import (
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from prompted_models import IGNORE, TASKS, P
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import SequenceClassifierOutput

import fastlora
from fastlora.peft import grouped, prompts

IDS = torch.randint(5, 90, (3, 11), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[0] * 4 + [1] * 7, [1] * 11, [1] * 9 + [0] * 2])
ANSWERS = torch.randint(5, 90, (3, 6), generator=torch.Generator().manual_seed(4))
ANSWERS[0, 4:] = IGNORE
METHODS = {
    "prompt tuning": PromptTuningConfig,
    "P-tuning": lambda **given: PromptEncoderConfig(**given, encoder_hidden_size=16),
    "multitask prompts": lambda **given: MultitaskPromptTuningConfig(**given, num_tasks=3),
    "prefix tuning": PrefixTuningConfig,
}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}
BERT = BertConfig(**SIZES, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
LLAMA = LlamaConfig(**SIZES, pad_token_id=0, classifier_dropout=0.0)
ROBERTA = RobertaConfig(**SIZES, hidden_dropout_prob=0, attention_probs_dropout_prob=0, pad_token_id=1)
MODELS = {
    "bert": (BertForSequenceClassification, BERT, "SEQ_CLS"),
    "roberta": (RobertaForSequenceClassification, ROBERTA, "SEQ_CLS"),
    "llama": (LlamaForSequenceClassification, LLAMA, "SEQ_CLS"),
    "bert, each token": (BertForTokenClassification, BERT, "TOKEN_CLS"),
    "llama, each token": (LlamaForTokenClassification, LLAMA, "TOKEN_CLS"),
    "bert, hidden states": (BertModel, BERT, "FEATURE_EXTRACTION"),
}


def pair(model: type, config: Any, method: str, task_type: str, **more: Any) -> tuple[Any, Any]:
    """Accelerated, and PEFT's own."""
    torch.manual_seed(0)
    found = get_peft_model(model(config), METHODS[method](task_type=task_type, num_virtual_tokens=P, **more))
    plain = copy.deepcopy(found)
    return fastlora.accelerate(found), plain


def t5(method: str, submodules: int | None) -> tuple[Any, Any]:
    config = T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=96, dropout_rate=0, decoder_start_token_id=0
    )
    return pair(T5ForConditionalGeneration, config, method, "SEQ_2_SEQ_LM", num_transformer_submodules=submodules)


def text(row: int) -> Tensor:
    return IDS[row : row + 1, MASK[row] == 1]


def tasks_of(method: str, rows: Any) -> dict[str, Tensor]:
    return {"task_ids": TASKS[rows]} if method == "multitask prompts" else {}


@pytest.mark.filterwarnings("ignore:adapter 'default' has")
@pytest.mark.parametrize("submodules", [1, None])
@pytest.mark.parametrize("method", METHODS)
def test_an_encoder_decoder(method: str, submodules: int | None) -> None:
    if method == "prefix tuning" and submodules == 1:
        pytest.skip("PEFT itself takes no such prefix: it gives the decoder's cross-attention the cache")
    model, plain = t5(method, submodules)
    out = model(input_ids=IDS, attention_mask=MASK, labels=ANSWERS, **tasks_of(method, slice(None)))
    total, count = torch.zeros(()), 0
    for row in range(3):
        one = slice(row, row + 1)
        own = plain(input_ids=text(row), labels=ANSWERS[one], **tasks_of(method, one))
        assert torch.allclose(out.logits[row, -6:], own.logits[0, -6:], atol=1e-5)
        labels = int((ANSWERS[row] != IGNORE).sum())
        total, count = total + own.loss * labels, count + labels
    assert torch.allclose(out.loss, total / count)
    out.loss.backward()
    (total / count).backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.grad is not None:
            assert torch.allclose(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4), name
    if submodules == 1:
        assert bool(model.prompt_encoder["default"].embedding.weight.grad.any(1).all())  # every row is trained


@pytest.mark.filterwarnings("ignore:adapter 'default' has")
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_an_encoder_decoder_generates(method: str, beams: int) -> None:
    model, plain = (one.eval() for one in t5(method, None))
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    out = model.generate(input_ids=IDS, attention_mask=MASK, **options, **tasks_of(method, slice(None)))
    for row in range(3):
        one = slice(row, row + 1)
        assert torch.equal(out[row], plain.generate(input_ids=text(row), **options, **tasks_of(method, one))[0])


def test_rows_that_nobody_trains_are_told() -> None:
    with pytest.warns(UserWarning, match="10 rows, of which PEFT uses 5"):
        t5("prompt tuning", None)


@pytest.mark.parametrize("method", ["prompt tuning", "P-tuning", "prefix tuning"])
@pytest.mark.parametrize("name", MODELS)
def test_an_encoder(name: str, method: str) -> None:
    kind, config, task_type = MODELS[name]
    model, plain = pair(kind, config, method, task_type)
    types = (
        {"token_type_ids": (IDS % 2) * MASK}
        if kind in (BertForSequenceClassification, BertForTokenClassification)
        else {}
    )
    labels = {"SEQ_CLS": torch.tensor([0, 1, 1]), "TOKEN_CLS": (IDS % 2).masked_fill(MASK == 0, IGNORE)}.get(task_type)
    given = {} if labels is None else {"labels": labels}
    out = model(input_ids=IDS, attention_mask=MASK, **types, **given)
    losses = []
    for row in range(3):
        there = MASK[row] == 1
        more = {what: value[row : row + 1, there] for what, value in types.items()}
        own = plain(input_ids=text(row), attention_mask=torch.ones_like(text(row)), **more)
        if task_type == "FEATURE_EXTRACTION":
            found, expected = out.last_hidden_state[row], own.last_hidden_state[0]
            found = found[: len(expected)]
        elif task_type == "TOKEN_CLS":
            found, expected = out.logits[row, there], own.logits[0, -int(there.sum()) :]
            losses.append(torch.nn.functional.cross_entropy(expected, labels[row, there], reduction="none"))
        else:
            found, expected = out.logits[row], own.logits[0]
            losses.append(torch.nn.functional.cross_entropy(expected, labels[row])[None])
        assert torch.allclose(found, expected, atol=1e-5)
    if losses:
        loss = torch.cat(losses).mean()
        assert torch.allclose(out.loss, loss)
        for one in (out.loss, loss):
            one.backward()
        ours, theirs = (one.prompt_encoder["default"].embedding.weight.grad for one in (model, plain))
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=1e-4)


GPT2 = GPT2Config(
    n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=40, pad_token_id=0, initializer_range=0.3,
    attn_pdrop=0, embd_pdrop=0, resid_pdrop=0,
)  # fmt: skip


def test_a_causal_classifier_with_learned_positions_and_kinds_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = pair(GPT2ForSequenceClassification, GPT2, "prompt tuning", "SEQ_CLS")
    for one in (plain, model):
        one.add_adapter("longer", PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=P + 3))
    model.load_state_dict(plain.state_dict())
    names, types = ["longer", "default", "default"], (IDS % 2) * MASK
    out = model(input_ids=IDS, attention_mask=MASK, token_type_ids=types, adapter_names=names)
    for row, name in enumerate(names):
        plain.set_adapter(name)
        # By hand: PEFT gives a prompt the kind 0, and its own forward has no positions.
        prompt = plain.get_prompt(1)
        embeds = torch.cat((prompt, plain.word_embeddings(text(row))), 1)
        before = torch.zeros(1, prompt.shape[1], dtype=torch.long)
        kinds = torch.cat((before, types[row : row + 1, MASK[row] == 1]), 1)
        own = plain.base_model(inputs_embeds=embeds, token_type_ids=kinds)
        assert torch.allclose(out.logits[row], own.logits[0], atol=1e-5)
    told: list[set[str]] = []
    model.base_model.register_forward_pre_hook(lambda _, args, given: told.append(set(given)), with_kwargs=True)
    model(input_ids=IDS, attention_mask=MASK)
    monkeypatch.setattr(prompts, "_parameters", lambda base: {})
    model(input_ids=IDS, attention_mask=MASK)
    assert told[0] - told[1] == {"position_ids"}


def test_each_token_behind_prompts_of_two_lengths() -> None:
    model, plain = pair(BertForTokenClassification, BERT, "prompt tuning", "TOKEN_CLS")
    longer = PromptTuningConfig(task_type="TOKEN_CLS", num_virtual_tokens=P + 3)
    for one in (plain, model):
        one.add_adapter("longer", longer)
    model.prompt_encoder.load_state_dict(plain.prompt_encoder.state_dict())
    names, types = ["longer", "default", "default"], (IDS % 2) * MASK
    labels = (IDS % 2).masked_fill(MASK == 0, IGNORE)
    given = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": types, "labels": labels}
    out = model(**given, adapter_names=names)
    for row, name in enumerate(names):
        plain.set_adapter(name)
        there = MASK[row] == 1
        own = plain(
            input_ids=text(row), attention_mask=torch.ones_like(text(row)), token_type_ids=types[row : row + 1, there]
        )
        assert torch.allclose(out.logits[row, there], own.logits[0, -int(there.sum()) :], atol=1e-5)
    as_tuple = model(**given, adapter_names=names, return_dict=False)
    assert type(as_tuple) is tuple and torch.equal(as_tuple[0], out.loss) and torch.equal(as_tuple[1], out.logits)


def test_hidden_states_are_without_kinds_of_tokens_as_pefts_are() -> None:
    model, plain = pair(BertModel, BERT, "prompt tuning", "FEATURE_EXTRACTION")
    ones = torch.ones_like(IDS)
    found = model(input_ids=IDS, attention_mask=ones, token_type_ids=IDS % 2).last_hidden_state
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it leaves them out
        expected = plain(input_ids=IDS, attention_mask=ones, token_type_ids=IDS % 2).last_hidden_state
    assert torch.allclose(found, expected, atol=1e-5)


OWN = ["other", "__base__", "default"]
ELSEWHERE = {
    "t5 prefix": ("prefix tuning", 2),
    "t5 multitask": ("multitask prompts", 3),
    "bert prefix": (BertForSequenceClassification, BERT, "SEQ_CLS", "prefix tuning"),
    "bert prefix, each token": (BertForTokenClassification, BERT, "TOKEN_CLS", "prefix tuning"),
    "roberta prompt, its head of two layers": (RobertaForSequenceClassification, ROBERTA, "SEQ_CLS", "prompt tuning"),
    "bert prompt": (BertForSequenceClassification, BERT, "SEQ_CLS", "prompt tuning"),
    "llama prompt": (LlamaForSequenceClassification, LLAMA, "SEQ_CLS", "prompt tuning"),
    "llama prompt, each token": (LlamaForTokenClassification, LLAMA, "TOKEN_CLS", "prompt tuning"),
}


TOGETHER = ("bert prompt", "llama prompt", "llama prompt, each token")


def two_adapters(kind: str) -> tuple[Any, Any, dict[str, Tensor]]:
    """Accelerated, PEFT's own, each with a second adapter whose prompt is longer and whose head is another; and a batch."""
    own = ELSEWHERE[kind]
    if len(own) == 2:
        model, plain = t5(own[0], None)
    else:
        model, plain = pair(own[0], own[1], own[3], own[2])
    longer = copy.deepcopy(plain.peft_config["default"])
    longer.num_virtual_tokens = P + 3
    plain.add_adapter("other", longer)
    model.add_adapter("other", copy.deepcopy(longer))
    with torch.no_grad():
        for name, weight in plain.named_parameters():
            if ".other." in name or name.startswith("prompt_encoder.other"):
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))), alpha=0.3)
    model.load_state_dict(plain.state_dict())
    given = {"input_ids": IDS, "attention_mask": MASK}
    if len(own) == 2:
        given["labels"] = ANSWERS
    else:
        given["labels"] = (IDS % 2).masked_fill(MASK == 0, IGNORE) if own[2] == "TOKEN_CLS" else torch.tensor([0, 1, 1])
    return model, plain, given | ({"task_ids": TASKS} if kind == "t5 multitask" else {})


def alone(plain: Any, given: dict[str, Tensor], row: int, name: str) -> tuple[Tensor, Tensor]:
    """The logits and the loss that PEFT has for a row, unpadded, with its own adapter; or the base model's."""
    there, one = MASK[row] == 1, slice(row, row + 1)
    own = {what: value[one] for what, value in given.items()}
    own |= {what: own[what][:, there] for what in ("input_ids", "attention_mask")}
    per_token = given["labels"].shape == IDS.shape
    labels = own.pop("labels")[:, there] if per_token else own["labels"]
    if name == "__base__":
        own.pop("task_ids", None)
        for module in grouped.wholes(plain):
            module._disable_adapters = True
        out = plain.get_base_model()(**own)
        for module in grouped.wholes(plain):
            module._disable_adapters = False
    else:
        plain.set_adapter(name)
        out = plain(**own)
    if not per_token:
        return out.logits[0], out.loss
    logits = out.logits[0, -labels.shape[1] :]  # PEFT's are of the prompt's columns, too, which it has no labels for
    return logits, torch.nn.functional.cross_entropy(logits, labels[0], ignore_index=IGNORE)


@pytest.mark.filterwarnings("ignore:adapter ")
@pytest.mark.parametrize("kind", ELSEWHERE)
def test_rows_have_prompts_and_heads_of_their_own(kind: str) -> None:
    """Also where a prompt cannot stand in front of the encoder's input, or the head is more than a layer: an adapter's rows at a time."""
    model, plain, given = two_adapters(kind)
    active = model(**given).logits
    out = model(**given, adapter_names=OWN)
    assert model.__dict__[prompts.KEY].last[1].startswith("an adapter's rows at a time") is (kind not in TOGETHER)
    assert torch.equal(model(**given).logits, active)  # nothing is left of it
    per_token = given["labels"].shape == IDS.shape
    labels = [int((one != IGNORE).sum()) for one in given["labels"]]
    losses = []
    for row, name in enumerate(OWN):
        logits, loss = alone(plain, given, row, name)
        found = out.logits[row, MASK[row] == 1] if per_token else out.logits[row]
        assert torch.allclose(found, logits[-len(found) :], atol=1e-5), row
        losses.append(loss * labels[row])
    expected = torch.stack(losses).sum() / sum(labels)
    assert torch.allclose(out.loss, expected, rtol=1e-5)
    out.loss.backward()
    expected.backward()
    theirs = dict(plain.named_parameters())
    trained = {name: one for name, one in model.named_parameters() if one.grad is not None}
    assert any("default" in name for name in trained) and any("other" in name for name in trained)
    for name, weight in trained.items():
        grad = theirs[name].grad
        assert grad is not None and torch.allclose(weight.grad, grad, atol=1e-5, rtol=1e-4), name
    as_tuple = model(**given, adapter_names=OWN, return_dict=False)
    assert type(as_tuple) is tuple and torch.equal(as_tuple[0], out.loss) and torch.equal(as_tuple[1], out.logits)
    assert torch.equal(model(**given, adapter_names=["default"] * 3).logits, model(**given).logits)
    with pytest.raises(ValueError, match=r"got \['typo'\], expected some of \['__base__', 'default', 'other'\]"):
        model(**given, adapter_names=["typo"] * 3)
    with pytest.raises(ValueError, match="adapter_names: got 2, expected one for each of 3 rows"):
        model(**given, adapter_names=OWN[:2])


@pytest.mark.filterwarnings("ignore:adapter ")
@pytest.mark.parametrize("kind", ["t5 prefix", "t5 multitask"])
def test_rows_with_prompts_of_their_own_generate(kind: str) -> None:
    model, plain, given = (one.eval() if isinstance(one, torch.nn.Module) else one for one in two_adapters(kind))
    del given["labels"]
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "num_return_sequences": 2, "eos_token_id": 7}
    out = model.generate(**given, adapter_names=OWN, **options)
    assert len(out) == 6
    for row, name in enumerate(OWN):
        one = {"input_ids": text(row), **({"task_ids": TASKS[row : row + 1]} if "task_ids" in given else {})}
        if name == "__base__":
            own = plain.get_base_model().generate(input_ids=text(row), **options)
        else:
            plain.set_adapter(name)
            own = plain.generate(**one, **options)
        found = out[2 * row : 2 * row + 2]
        assert torch.equal(found[:, : own.shape[1]], own) and not found[:, own.shape[1] :].any()
    for what in ({"return_dict_in_generate": True}, {"prefix_allowed_tokens_fn": lambda batch, ids: [5]}):
        with pytest.raises(
            ValueError, match=f"^{next(iter(what))}: expected none where rows have prompts of their own"
        ):
            model.generate(**given, adapter_names=OWN, **what)


def test_what_is_not_of_rows_is_refused_where_they_run_an_adapter_at_a_time() -> None:
    model, _, given = two_adapters("bert prefix")
    with pytest.raises(ValueError, match="^output_hidden_states: expected none where rows have prompts of their own"):
        model(**given, adapter_names=OWN, output_hidden_states=True)
    with pytest.raises(ValueError, match="^gradient_checkpointing: a prefix needs a cache"):
        model.train().gradient_checkpointing_enable()
        model(**given, adapter_names=OWN)


@pytest.mark.filterwarnings("ignore:adapter ")
def test_what_an_encoder_has_made_is_of_one_adapter() -> None:
    model, _, given = two_adapters("t5 prefix")
    made = model.base_model.get_encoder()(input_ids=IDS, attention_mask=MASK)
    given = {**given, "encoder_outputs": made}
    assert torch.equal(model(**given, adapter_names=["default"] * 3).logits, model(**given).logits)
    with pytest.raises(ValueError, match=r"adapter_names: got \['__base__', 'default', 'other'\], expected 'default'"):
        model(**given, adapter_names=OWN)


def test_hidden_states_of_rows_with_prefixes_of_their_own() -> None:
    """An output without a loss, of a batch without labels."""
    model, plain = pair(BertModel, BERT, "prefix tuning", "FEATURE_EXTRACTION")
    for one in (plain, model):
        one.add_adapter("other", copy.deepcopy(one.peft_config["default"]))
    model.load_state_dict(plain.state_dict())
    out = model(input_ids=IDS, attention_mask=MASK, adapter_names=["other", "default", "other"])
    for row, name in enumerate(("other", "default", "other")):
        plain.set_adapter(name)
        own = plain(input_ids=text(row), attention_mask=torch.ones_like(text(row))).last_hidden_state[0]
        assert torch.allclose(out.last_hidden_state[row, : len(own)], own, atol=1e-5)


def test_what_rows_are_given_an_adapter_at_a_time() -> None:
    """Of rows is what has as many; numbers that are no rows' go to all. A mean over numbers is one over all of them, whatever they are."""
    seen: list[dict[str, Any]] = []

    def run(name: str, own: dict[str, Any]) -> Any:
        seen.append(own)
        return SequenceClassifierOutput(loss=own["labels"].mean(), logits=own["labels"])

    given = {"labels": torch.tensor([1.0, -100.0, 4.0]), "factor": torch.tensor(2.0), "table": torch.ones(5, 2)}
    out = grouped.forward(run, given, ["a", "b", "a"])
    assert torch.equal(out.logits, given["labels"]) and torch.allclose(out.loss, given["labels"].mean())
    assert [one["labels"].tolist() for one in seen] == [[1.0, 4.0], [-100.0]]
    assert all(one["factor"] is given["factor"] and one["table"] is given["table"] for one in seen)


def test_a_batch_without_a_label_in_some_rows_has_the_loss_of_the_others() -> None:
    model, plain, given = two_adapters("bert prefix, each token")
    given["labels"][0] = IGNORE
    out = model(**given, adapter_names=OWN)
    own = [alone(plain, given, row, OWN[row])[1] * int((given["labels"][row] != IGNORE).sum()) for row in (1, 2)]
    assert torch.allclose(out.loss, sum(own) / int((given["labels"] != IGNORE).sum()), rtol=1e-5)
    given["labels"][:] = IGNORE
    assert model(**given, adapter_names=OWN).loss.isnan()  # as torch has it


@pytest.mark.parametrize("family", ["t5", "bert"])
def test_a_prefix_that_sees_the_input_cannot_be_checkpointed(family: str) -> None:
    if family == "t5":
        model, _ = t5("prefix tuning", None)
    else:
        model, _ = pair(BertForSequenceClassification, BERT, "prefix tuning", "SEQ_CLS")
    given = {"input_ids": IDS, "attention_mask": MASK} | ({"labels": ANSWERS} if family == "t5" else {})
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="^gradient_checkpointing: a prefix needs a cache"):
        model(**given)
    assert model.eval()(**given).logits.isfinite().all()
