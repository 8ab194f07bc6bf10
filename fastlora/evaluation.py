"""What a model can: held-out loss, perplexity, and scores of its answers, all over the same rows."""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastlora.data.examples import Columns, Example
from fastlora.data.lines import without_labels
from fastlora.data.rows import Row, batches, collate, encode, pad_token_id, reference, require_count, row_length
from fastlora.data.tasks import read_rows
from fastlora.generation import answer, leave_room
from fastlora.language_model_loss import LanguageModelLoss, evaluating
from fastlora.models import positions

ROUGE = ("rouge1", "rouge2", "rougeL")
UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"  # kana and ideographs, which no space parts into words
WORDS = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
MOST_LABELS = 20
LEAST_OF_LABEL = 2  # rows of each, on average: fewer are answers of their own


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
    f1: float | None  # of the words that an answer shares with the completion, as SQuAD counts them
    accuracy: (
        float | None
    )  # fraction of answers that begin with the completion; None where the completions are no labels


def evaluate(
    model: Any,
    tokenizer: Any,
    data: str | Path | Sequence[str | Path] | Sequence[Example],
    *,
    columns: Columns | None = None,
    batch_size: int = 8,
    max_length: int = 512,
    truncation: str = "prompt",
    train_on_turns: str = "auto",
    completion_only_loss: bool = True,
    max_new_tokens: int = 64,
    generations: bool = True,
    limit: int | None = None,
) -> EvalResult:
    """Held-out loss and perplexity; with `generations` also the `scores` of greedy answers.

    Each answer is given to the very prompt tokens that its row of the loss has.

    Args:
        data: what `read_rows` takes: what `read_examples` does, and tasks' YAML; or examples.
        columns: which column is which field, for what is read.
        max_length: tokens a row may have; never more than the model has positions for.
        truncation: what a longer row loses, as in training: prompt, completion, or drop for the whole row.
        train_on_turns, completion_only_loss: which tokens the loss is of, as in training (`encode`).
        limit: take only the first so many rows.

    Raises:
        DataError: bad lines.
        ValueError: a bad option, or one that leaves no row.
    """
    require_count("max_length", max_length)
    require_count("batch_size", batch_size)
    require_count("max_new_tokens", max_new_tokens)
    if limit is not None:
        require_count("limit", limit)
    pairs = model.config.is_encoder_decoder
    examples = _examples(data, columns, row_length(tokenizer, pairs), max_length)[:limit]
    if generations and any(example.prompt == "" for example in examples):
        raise ValueError("data: rows of plain text have no prompt to answer: expected no generations of them")
    longest = min(max_length, positions(model) or max_length)
    encoded = encode(
        examples,
        tokenizer,
        longest,
        truncation,
        train_on_turns=train_on_turns,
        completion_only_loss=completion_only_loss,
        encoder_decoder=pairs,
    )
    # Before anything is computed: there may be no room for an answer.
    ids = [row.input_ids[: row.prompt_length] for row in encoded.rows]
    ids = leave_room(model, tokenizer, ids, encoded.examples, max_new_tokens) if generations else ids
    mean = mean_loss(model, tokenizer, encoded.rows, batch_size)
    perplexity = math.exp(mean) if mean < 700 else math.inf  # exp(710) overflows
    scored: dict[str, float] = {}
    if generations:
        pairs = zip(encoded.examples, encoded.rows, strict=True)
        references = [reference(example, row, tokenizer) for example, row in pairs]
        prompts = [example.prompt for example in encoded.examples]
        answers = answer(model, tokenizer, prompts, ids, max_new_tokens, batch_size)
        scored = scores(answers, references)
    return EvalResult(
        rows=len(encoded.rows),
        dropped_rows=len(encoded.dropped),
        prompt_cut_rows=len(encoded.prompt_cut),
        completion_cut_rows=len(encoded.completion_cut),
        tokens=sum(row.labelled for row in encoded.rows),
        loss=mean,
        perplexity=perplexity,
        **{name: scored.get(name) for name in ("exact_match", *ROUGE, "f1", "accuracy")},
    )


def _examples(
    data: str | Path | Sequence[str | Path] | Sequence[Example],
    columns: Columns | None,
    length: Callable[[Example], int],
    max_tokens: int,
) -> list[Example]:
    same: dict[str, Any] = {"columns": columns, "length": length, "max_tokens": max_tokens}
    if isinstance(data, str | Path):
        return read_rows(data, **same)
    given = [one for one in data if isinstance(one, Example)]
    return given if len(given) == len(data) else read_rows([str(one) for one in data], **same)


def mean_loss(model: Any, tokenizer: Any, rows: Sequence[Row], batch_size: int) -> float:
    """The model's mean loss a labelled token of rows, in nats."""
    return total_loss(model, tokenizer, rows, batch_size).item() / sum(row.labelled for row in rows)


def total_loss(
    model: Any, tokenizer: Any, rows: Sequence[Row], batch_size: int, process: int = 0, processes: int = 1
) -> torch.Tensor:
    """The summed loss of all labelled tokens of rows, in nats, a float64 scalar on the CPU; of several processes each has a share of that sum."""
    total, loss = torch.zeros((), dtype=torch.float64), LanguageModelLoss(model)
    parts = list(batches(sorted(rows, key=lambda row: row.tokens), batch_size))
    own = parts[process::processes]
    if len(own) < len(parts[::processes]):  # every process calls the model as often as the others, here for nothing
        own.append([without_labels(parts[0][0])])
    with torch.no_grad(), evaluating(model):
        for part in own:
            batch = {name: value.to(model.device) for name, value in collate(part, pad_token_id(tokenizer)).items()}
            total += loss(batch).double().cpu()
    return total


def scores(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """exact_match, f1, rouge1, rouge2 and rougeL (none where rouge-score is missing), and accuracy where the references are labels; 0 to 1."""
    found = {"exact_match": exact_match(answers, references), "f1": token_f1(answers, references)}
    with suppress(ModuleNotFoundError):
        found |= rouge(answers, references)
    return found | ({"accuracy": accuracy(answers, references)} if labels(references) else {})


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Fraction of answers equal to their reference, white space at the ends aside."""
    pairs = zip(answers, references, strict=True)
    return sum(answer.strip() == reference.strip() for answer, reference in pairs) / len(references)


def rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, without stemming; 0 to 1. Of ASCII as rouge-score has them; it knows no letters beside
    those, and gives texts of any other script 0.

    Raises:
        ModuleNotFoundError: the package rouge-score is missing.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE, tokenizer=_Words())
    scores = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE}


class _Words:
    """Of any script, for rouge-score: letters and digits in a row; each ideograph and kana by itself, as it is custom."""

    def tokenize(self, text: str) -> list[str]:
        return WORDS.findall(text.lower())


def token_f1(answers: Sequence[str], references: Sequence[str]) -> float:
    """Mean F1 of the words that an answer has in common with its reference, as SQuAD counts them (Rajpurkar et al. 2016)."""
    return sum(map(_f1, answers, references)) / len(references)


def _f1(answer: str, reference: str) -> float:
    given, wanted = _words(answer), _words(reference)
    if not given or not wanted:
        return float(given == wanted)
    return 2 * (given & wanted).total() / (given.total() + wanted.total())


def _words(text: str) -> Counter[str]:
    """Without case, punctuation and articles."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return Counter(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def labels(references: Sequence[str]) -> set[tuple[str, ...]]:
    """The words of each label, where the references are labels: 2 to 20, told apart by their words, for twice as many rows or more. Else empty."""
    texts = {reference.strip() for reference in references}
    if not 2 <= len(texts) <= min(MOST_LABELS, len(references) // LEAST_OF_LABEL):
        return set()
    found = {_label(text) for text in texts}
    return found if len(found) == len(texts) and () not in found else set()


def are_labels(examples: Sequence[Example]) -> bool:
    """Whether examples have prompts, and `labels` as completions."""
    return all(one.prompt != "" for one in examples) and bool(labels([one.completion for one in examples]))


def accuracy(answers: Sequence[str], references: Sequence[str]) -> float:
    """Fraction of answers whose first words are their reference's, and no longer label's; the references are `labels`."""
    known = labels(references)

    def chosen(words: tuple[str, ...]) -> tuple[str, ...]:
        return max((label for label in known if words[: len(label)] == label), key=len, default=())

    pairs = zip(map(_label, answers), map(_label, references), strict=True)
    return sum(chosen(given) == wanted for given, wanted in pairs) / len(references)


def _label(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.casefold()))
