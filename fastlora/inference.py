"""A model with its adapters from disk: load it, let it answer, and measure it."""

import importlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from fastlora.adapters import Adapter, is_adapter
from fastlora.adapters import load as load_adapters
from fastlora.adapters import read as read_adapter
from fastlora.data.examples import (
    Example,
    Prompt,
    batches,
    collate,
    encode,
    encode_prompt,
    pad_token_id,
    read_examples,
)
from fastlora.losses import LanguageModelLoss

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BASE = "__base__"  # PEFT's name for "no adapter"


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
        ValueError: the folder holds an adapter, the model is no decoder, or its files are damaged.
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
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=stored_or, trust_remote_code=False)
    return model.to(device)


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
        ValueError: a bad dtype or adapter name, no path and nothing that names one, or a damaged file; AdapterError: an adapter's.
        FileNotFoundError, OSError: an adapter or the model is not there.
    """
    for name in adapters or {}:
        if not name or "." in name or name == BASE:
            raise ValueError(f"adapter name {name!r}: expected a name without dots other than {BASE}")
        if hasattr(torch.nn.ModuleDict, name) or hasattr(torch.nn.ParameterDict, name):  # PEFT keeps adapters there
            raise ValueError(
                f"adapter name {name!r}: torch's modules have something of that name, expected another one"
            )
    device = default_device()
    chosen = resolve_dtype(dtype, device)
    read = {name: read_adapter(folder) for name, folder in (adapters or {}).items()}
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


@torch.no_grad()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    adapter_name: str | None = None,
) -> list[str]:
    """Greedy answers, one a prompt, in the prompts' order.

    Args:
        prompts: texts, or lists of messages for the chat template.
        adapter_name: who answers: a loaded adapter, "__base__" for none of them, None for the one that is active.

    Raises:
        ValueError: no adapter has that name.
    """
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # rows of like length share a batch: less padding
    answers = [""] * len(ids)
    options = _greedy(model, tokenizer, max_new_tokens)
    with _evaluating(model), _answering_as(model, adapter_name):
        for batch in batches(by_length, batch_size):
            inputs = _pad_left([ids[i] for i in batch], pad_token_id(tokenizer), model.device)
            out = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(batch, tokenizer.batch_decode(out, skip_special_tokens=True), strict=True):
                answers[i] = text
    return answers


def _greedy(model: Any, tokenizer: Any, max_new_tokens: int) -> dict[str, Any]:
    ends = model.generation_config.eos_token_id
    ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    return {
        "max_new_tokens": max_new_tokens,
        "do_sample": False,
        "num_beams": 1,
        "temperature": None,
        "top_p": None,
        "top_k": None,
        "pad_token_id": pad_token_id(tokenizer),
        "eos_token_id": sorted(ends) or None,
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
    rows: int
    dropped_rows: int  # max_length left nothing of the completion
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
    max_new_tokens: int = 64,
    generations: bool = True,
    limit: int | None = None,
) -> EvalResult:
    """Held-out loss and perplexity; with `generations` also exact match and ROUGE of greedy answers.

    Args:
        data: a JSONL file, or examples.
        limit: take only the first so many rows.

    Raises:
        DataError: bad lines.
    """
    examples = (read_examples(data) if isinstance(data, str | Path) else list(data))[:limit]
    encoded = encode(examples, tokenizer, max_length)
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
        prompts, references = (
            [example.prompt for example in examples],
            [example.completion.strip() for example in examples],
        )
        answers = generate(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)
        matches = sum(answer.strip() == reference for answer, reference in zip(answers, references, strict=True)) / len(
            answers
        )
        rouge = _rouge(answers, references)
    return EvalResult(
        rows=len(encoded.rows),
        dropped_rows=len(encoded.dropped),
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
