"""A model with its adapters from disk: load it, let it answer, and measure it."""

import importlib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from jinja2 import TemplateError
from torch import Tensor

from fastlora.adapters import Adapter, is_adapter
from fastlora.adapters import load as load_adapters
from fastlora.adapters import read as read_adapter
from fastlora.data.examples import BadLine, Example, Prompt, read_examples
from fastlora.data.rows import (
    Row,
    batches,
    collate,
    cut_prompt,
    encode,
    encode_prompt,
    pad_token_id,
    require_count,
    turn_end,
)
from fastlora.layers import BASE
from fastlora.losses import LanguageModelLoss
from fastlora.typed import fits, listed, shown

logger = logging.getLogger("fastlora")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def default_device() -> torch.device:
    """The device that training uses, too: this process's GPU if there is one, unless ACCELERATE_USE_CPU is set."""
    return PartialState().device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype called `name`; "auto" is bfloat16 on a card that computes in it, and float32 everywhere else; "stored" is None, the checkpoint's.

    Raises:
        ValueError: another name.
    """
    if name == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float32
    if name == "stored":
        return None
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: expected one of auto, stored, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_base(path: str, dtype: torch.dtype | None, device: torch.device) -> Any:
    """The causal language model saved in a folder, or known to the hub by that id.

    Args:
        dtype: None: the one that its config names, or else the one that its first weights are stored in.

    Raises:
        ValueError: the folder holds an adapter, the model is no decoder, or its files are damaged, or lack weights that it has.
        OSError: there is no such model.
    """
    from transformers import AutoModelForCausalLM

    config = _base_config(path)
    if config.is_encoder_decoder:
        raise ValueError(
            f"model={path}: expected a decoder, got an encoder-decoder model"
            " (transformers' trainers take it, with fastlora.accelerate)"
        )
    with _named(path, "the model"):
        stored_or = "auto" if dtype is None else dtype
        options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # told below
        with _without_report():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=stored_or, trust_remote_code=False, **options
            )
    model, found = loaded
    _require_weights(path, found)
    ends = model.generation_config.eos_token_id
    if not fits(ends, int | list[int] | None):
        raise ValueError(f"model={path}: generation_config.json: eos_token_id: expected tokens, got {shown(ends)}")
    return model.to(device)


@contextmanager
def _without_report() -> Iterator[None]:
    """Silence transformers' table of missing weights, of many lines, where an error of one line follows."""
    log = logging.getLogger("transformers.modeling_utils")

    def is_heard(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "LOAD REPORT" not in text or not ("MISSING" in text or "MISMATCH" in text)

    log.addFilter(is_heard)
    try:
        yield
    finally:
        log.removeFilter(is_heard)


def _require_weights(path: str, found: Mapping[str, Any]) -> None:
    """Refuse a model some of whose weights transformers has made up: the files have none for them, or of another shape."""
    missing = sorted(found["missing_keys"])
    if missing:
        raise ValueError(f"model={path}: its files lack {len(missing)} of the model's weights: {listed(missing)}")
    for name, stored, expected in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"model={path}: {name}: its files have shape {list(stored)}, expected {list(expected)} as config.json says"
        )


def load_tokenizer(path: str) -> Any:
    """The tokenizer saved beside a model, or known to the hub by the model's id.

    Raises:
        ValueError: the folder holds an adapter, no tokenizer, or one with tokens that the model's embedding has no rows for.
        OSError: there is no such model.
    """
    from transformers import AutoTokenizer

    config = _base_config(path)
    with _named(path, "its tokenizer"):
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    _check_vocabulary(path, tokenizer, getattr(config.get_text_config(), "vocab_size", None))
    return tokenizer


def _check_vocabulary(path: str, tokenizer: Any, rows: int | None) -> None:
    """Refuse tokens that a text may hold and the embedding does not; a special one that nothing here writes (an image's) does no harm."""
    if rows is None or len(tokenizer) <= rows:
        return
    written = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    template, special = str(tokenizer.chat_template or ""), tokenizer.added_tokens_decoder
    beyond = [
        token
        for token, number in tokenizer.get_vocab().items()
        if number >= rows
        and (number not in special or not special[number].special or token in written or token in template)
    ]
    if beyond:
        raise ValueError(
            f"model={path}: the tokenizer has {len(tokenizer):,} tokens and the embedding {rows:,} rows: none for"
            f" {beyond[0]!r}; expected a tokenizer of this model, or a model saved after resize_token_embeddings"
        )


def _base_config(path: str) -> Any:
    """The config of a base model, once the path is known not to be anything else."""
    from transformers import AutoConfig

    folder = Path(path)
    if is_adapter(folder):
        raise ValueError(
            f"model={path}: the folder holds an adapter, expected a base model; it is used as adapter={path}"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model={path}: expected a folder with a model, there is no config.json")
    if folder.is_file():
        raise NotADirectoryError(f"model={path}: expected a folder with a model, got a file")
    if _is_path(path) and not folder.is_dir():
        raise FileNotFoundError(f"model: there is no folder {path}")
    with _named(path, "config.json"):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def _is_path(name: str) -> bool:
    """Whether a model's name can be no hub id, OWNER/MODEL: it is not looked for there."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


@contextmanager
def _named(path: str, what: str) -> Iterator[None]:
    """Whatever transformers raises for a model that is not there, or that is damaged, says which one it is."""
    try:
        yield
    except OSError as error:
        if Path(path).is_dir():
            raise OSError(f"model={path}: {what} cannot be loaded: {error}") from error
        raise OSError(f"model={path}: neither a model's folder nor to be had from the hub: {error}") from error
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of any kind: KeyError, RuntimeError, SafetensorError, tokenizers' own
        raise ValueError(f"model={path}: {what} cannot be loaded: {type(error).__name__}: {error}") from error


def load_model(
    path: str | None,
    adapters: Mapping[str, str | Path] | None = None,
    *,
    dtype: str = "auto",
    accelerate: bool = True,
    allow_missing: bool = False,
) -> tuple[Any, Any]:
    """Load a base model and any number of LoRA adapters onto it, ready to answer.

    Args:
        path: the base: a folder or a hub id. None: the one that the first adapter was trained on.
        adapters: folders by adapter name; the first is the active one.
        dtype: the base's: auto, float32, bfloat16, or stored, which is the checkpoint's own.
        accelerate: run the adapters' layers fused.
        allow_missing: tensors that an adapter's file lacks are as PEFT begins, with a warning, in place of an error.

    Returns:
        The model, in eval mode, on the GPU if there is one; and its tokenizer.

    Raises:
        TypeError: adapters are no folders by name.
        ValueError: a bad dtype or adapter name, no path and nothing that names one, or a damaged file; AdapterError: an adapter's.
        FileNotFoundError, OSError: an adapter or the model is not there.
    """
    adapters = {} if adapters is None else adapters
    if not isinstance(adapters, Mapping) or not fits(dict(adapters), dict[str, str | Path]):
        raise TypeError(f"adapters={shown(adapters)}: expected folders by adapter name, as in {{'default': FOLDER}}")
    for name in adapters:
        if not name or "." in name or name == BASE:
            raise ValueError(f"adapter name {name!r}: expected a name without dots other than {BASE}")
        if hasattr(torch.nn.ModuleDict, name) or hasattr(torch.nn.ParameterDict, name):  # PEFT keeps adapters there
            raise ValueError(
                f"adapter name {name!r}: torch's modules have something of that name, expected another one"
            )
    device = default_device()
    chosen = resolve_dtype(dtype, device)
    read = {name: read_adapter(folder) for name, folder in adapters.items()}
    base = path or base_of(read.values())
    tokenizer = load_tokenizer(base)
    model = load_base(base, chosen, device)
    if read:
        model = load_adapters(model, read, allow_missing=allow_missing).requires_grad_(False)
        if accelerate:
            from fastlora.peft import accelerate as accelerate_model

            accelerate_model(model)
    return model.eval(), tokenizer


def base_of(adapters: Iterable[Adapter]) -> str:
    """The base model that the first of the adapters was trained on.

    Raises:
        ValueError: none names one.
        FileNotFoundError: it was a folder, and is not there any more.
    """
    adapter = next((adapter for adapter in adapters if adapter.base), None)
    if adapter is None:
        raise ValueError("model: no base model was named, and no adapter names one")
    base = str(adapter.base)
    if _is_path(base) and not Path(base).is_dir():
        raise FileNotFoundError(
            f"adapter={adapter.folder}: it was trained on {base}, and there is no such folder any more: name the base as model=FOLDER"
        )
    return base


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    max_length: int | None = None,
    adapter_name: str | None = None,
) -> list[str]:
    """Greedy answers, one a prompt, in the prompts' order.

    A prompt that leaves no room for the answer loses its oldest tokens, as in training, with a warning.

    Args:
        prompts: texts, or lists of messages for the chat template.
        max_length: tokens that a prompt and its answer may have together; None: as many as the model has positions for.
        adapter_name: who answers: a loaded adapter, "__base__" for none of them, None for the one that is active.

    Raises:
        ValueError: a bad option, or one that leaves nothing to the prompt; a prompt that has no tokens, or that the chat
            template refuses; no adapter has that name.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is a string: expected a list of prompts")
    _require_counts(max_new_tokens=max_new_tokens, batch_size=batch_size, max_length=max_length)
    ids = [_prompt_tokens(tokenizer, prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)]
    ids = _leave_room(model, tokenizer, ids, max_new_tokens, max_length)
    return _answer(model, tokenizer, prompts, ids, max_new_tokens, batch_size, adapter_name)


def _require_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None or name not in ("max_length", "limit"):
            require_count(name, value)


def _prompt_tokens(tokenizer: Any, prompt: Prompt, name: str) -> list[int]:
    if not isinstance(prompt, str) and not (isinstance(prompt, list) and prompt):
        raise ValueError(f"{name}: expected a text or a list of messages, got {type(prompt).__name__}")
    try:
        ids = encode_prompt(tokenizer, prompt)
    except (TemplateError, BadLine, UnicodeEncodeError) as error:
        raise ValueError(f"{name}: {error}") from error
    if not ids:
        raise ValueError(f"{name} has no tokens: expected a text that is not empty, the tokenizer opens none by itself")
    return ids


@torch.no_grad()
def _answer(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    ids: Sequence[list[int]],
    max_new_tokens: int,
    batch_size: int,
    adapter_name: str | None = None,
) -> list[str]:
    """Answers to `prompts`, whose tokens are `ids`."""
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # rows of like length share a batch: less padding
    answers = [""] * len(ids)
    options = _greedy(model, tokenizer, max_new_tokens, prompts)
    with _evaluating(model), _answering_as(model, adapter_name):
        for batch in batches(by_length, batch_size):
            inputs = _pad_left([ids[i] for i in batch], pad_token_id(tokenizer), model.device)
            out = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(batch, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True):
                answers[i] = text
    return answers


def _leave_room(
    model: Any, tokenizer: Any, ids: list[list[int]], max_new_tokens: int, max_length: int | None = None
) -> list[list[int]]:
    """The prompts' tokens without the oldest of those that leave no room for an answer."""
    limits = {"max_length": max_length, "the number of the model's positions": _positions(model)}
    name, limit = min(limits.items(), key=lambda item: item[1] or math.inf)
    if limit is None:
        return ids
    room = limit - max_new_tokens
    if room < 2:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves nothing to the prompt: {name} is {limit}")
    cut = [i for i, row in enumerate(ids) if len(row) > room]
    if cut:
        text = "cut the oldest tokens of %d of %d prompts (the first: prompts[%d]): %s is %d, max_new_tokens %d"
        logger.warning(text, len(cut), len(ids), cut[0], name, limit, max_new_tokens)
    return [cut_prompt(tokenizer, row, room) for row in ids]


def _positions(model: Any) -> int | None:
    """How many tokens a row of the model may have; None where its configuration does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def require_positions(model: Any, rows: Sequence[Row]) -> None:
    """Raise ValueError if a row has more tokens than the model has positions for."""
    longest, positions = max(len(row.input_ids) for row in rows), _positions(model)
    if positions is not None and longest > positions:
        raise ValueError(
            f"max_length: the longest row has {longest} tokens and the model positions for {positions};"
            f" expected max_length={positions} or less"
        )


def _greedy(model: Any, tokenizer: Any, max_new_tokens: int, prompts: Sequence[Prompt]) -> dict[str, Any]:
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}
    chat = next((prompt for prompt in prompts if not isinstance(prompt, str)), None)
    if chat:
        ends.add(turn_end(tokenizer, chat))  # training may have taught no other end
    return {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "pad_token_id": pad_token_id(tokenizer),
        "eos_token_id": sorted(ends - {None}) or None,
    }


def _pad_left(rows: list[list[int]], pad: int, device: torch.device) -> dict[str, Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _answering_as(model: Any, adapter_name: str | None) -> Iterator[None]:
    adapters = list(getattr(model, "peft_config", {}))
    if adapter_name is None or (adapter_name == BASE and not adapters):
        yield
        return
    if adapter_name not in (BASE, *adapters):
        raise ValueError(
            f"adapter_name={adapter_name!r}: expected {BASE} or one of {', '.join(adapters) or 'none loaded'}"
        )
    # PEFT freezes and unfreezes adapters as it switches them.
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    active = model.active_adapters
    try:
        if adapter_name == BASE:
            with model.disable_adapter():
                yield
        else:
            model.base_model.set_adapter(adapter_name)
            yield
    finally:
        model.base_model.set_adapter(active)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trainable)


@dataclass(frozen=True)
class EvalResult:
    rows: int  # every figure below is over these and no others
    dropped_rows: int  # too long for max_length
    prompt_cut_rows: int  # those of `rows` whose prompt lost its oldest tokens
    completion_cut_rows: int  # those whose completion lost its end, in the loss
    tokens: int  # that the loss is the mean of
    loss: float  # nats a token
    perplexity: float
    exact_match: float | None  # fraction of answers equal to the completion, white space at the ends aside
    rouge1: float | None  # F-measures, no stemming; None where the package rouge-score is missing
    rouge2: float | None
    rougeL: float | None


def evaluate(
    model: Any,
    tokenizer: Any,
    data: str | Path | Sequence[Example],
    *,
    batch_size: int = 8,
    max_length: int = 512,
    truncation: str = "prompt",
    max_new_tokens: int = 64,
    generations: bool = True,
    limit: int | None = None,
) -> EvalResult:
    """Held-out loss and perplexity; with `generations` also exact match and ROUGE of greedy answers.

    Each answer is given to the very prompt tokens that its row of the loss has.

    Args:
        data: a JSONL file, or examples.
        max_length: tokens a row may have; never more than the model has positions for.
        truncation: what a longer row loses, as in training: prompt, completion, or drop for the whole row.
        limit: take only the first so many rows.

    Raises:
        DataError: bad lines.
        ValueError: a bad option, or one that leaves no row.
    """
    require_count("max_length", max_length)
    _require_counts(batch_size=batch_size, max_new_tokens=max_new_tokens, limit=limit)
    examples = (read_examples(data) if isinstance(data, str | Path) else list(data))[:limit]
    encoded = encode(examples, tokenizer, min(max_length, _positions(model) or max_length), truncation)
    # Before anything is computed: there may be no room for an answer.
    ids = [row.input_ids[: row.prompt_length] for row in encoded.rows]
    ids = _leave_room(model, tokenizer, ids, max_new_tokens) if generations else ids
    total, loss = torch.zeros((), dtype=torch.float64), LanguageModelLoss(model)
    with torch.no_grad(), _evaluating(model):
        for rows in batches(sorted(encoded.rows, key=lambda row: len(row.input_ids)), batch_size):
            batch = {name: value.to(model.device) for name, value in collate(rows, pad_token_id(tokenizer)).items()}
            total += loss(batch).double().cpu()
    tokens = sum(row.labelled for row in encoded.rows)
    mean = total.item() / tokens
    perplexity = math.exp(mean) if mean < 700 else math.inf  # exp(710) overflows
    matches, rouge = None, {}
    if generations:
        references = [example.completion.strip() for example in encoded.examples]
        prompts = [example.prompt for example in encoded.examples]
        answers = _answer(model, tokenizer, prompts, ids, max_new_tokens, batch_size)
        matches = sum(answer.strip() == reference for answer, reference in zip(answers, references, strict=True)) / len(
            answers
        )
        rouge = _rouge(answers, references)
    return EvalResult(
        rows=len(encoded.rows),
        dropped_rows=len(encoded.dropped),
        prompt_cut_rows=len(encoded.prompt_cut),
        completion_cut_rows=len(encoded.completion_cut),
        tokens=tokens,
        loss=mean,
        perplexity=perplexity,
        exact_match=matches,
        rouge1=rouge.get("rouge1"),
        rouge2=rouge.get("rouge2"),
        rougeL=rouge.get("rougeL"),
    )


def _rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    try:
        scorer = importlib.import_module("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rouge2", "rougeL"])
    except ModuleNotFoundError:
        return {}
    scores = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in scores[0]}
