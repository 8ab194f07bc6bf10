"""What a model can: held-out loss, perplexity, exact match and ROUGE, all over the same rows."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastlora.data.examples import Columns, Example, read_examples
from fastlora.data.rows import Row, batches, collate, encode, pad_token_id, reference, require_count
from fastlora.generation import answer, leave_room
from fastlora.language_model_loss import LanguageModelLoss, evaluating
from fastlora.models import positions

ROUGE = ("rouge1", "rouge2", "rougeL")


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
    data: str | Path | Sequence[str | Path] | Sequence[Example],
    *,
    columns: Columns | None = None,
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
        data: what `read_examples` takes, or examples.
        columns: which column is which field, for what is read.
        max_length: tokens a row may have; never more than the model has positions for.
        truncation: what a longer row loses, as in training: prompt, completion, or drop for the whole row.
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
    examples = _examples(data, columns)[:limit]
    if generations and any(example.prompt == "" for example in examples):
        raise ValueError("data: rows of plain text have no prompt to answer: expected no generations of them")
    encoded = encode(examples, tokenizer, min(max_length, positions(model) or max_length), truncation)
    # Before anything is computed: there may be no room for an answer.
    ids = [row.input_ids[: row.prompt_length] for row in encoded.rows]
    ids = leave_room(model, tokenizer, ids, max_new_tokens) if generations else ids
    mean = mean_loss(model, tokenizer, encoded.rows, batch_size)
    perplexity = math.exp(mean) if mean < 700 else math.inf  # exp(710) overflows
    matches, scores = None, {}
    if generations:
        pairs = zip(encoded.examples, encoded.rows, strict=True)
        references = [reference(example, row, tokenizer) for example, row in pairs]
        prompts = [example.prompt for example in encoded.examples]
        answers = answer(model, tokenizer, prompts, ids, max_new_tokens, batch_size)
        matches = exact_match(answers, references)
        with suppress(ModuleNotFoundError):  # as the result says
            scores = rouge(answers, references)
    return EvalResult(
        rows=len(encoded.rows),
        dropped_rows=len(encoded.dropped),
        prompt_cut_rows=len(encoded.prompt_cut),
        completion_cut_rows=len(encoded.completion_cut),
        tokens=sum(row.labelled for row in encoded.rows),
        loss=mean,
        perplexity=perplexity,
        exact_match=matches,
        **{name: scores.get(name) for name in ROUGE},
    )


def _examples(data: str | Path | Sequence[str | Path] | Sequence[Example], columns: Columns | None) -> list[Example]:
    if isinstance(data, str | Path):
        return read_examples(data, columns=columns)
    given = [one for one in data if isinstance(one, Example)]
    return given if len(given) == len(data) else read_examples([str(one) for one in data], columns=columns)


def mean_loss(model: Any, tokenizer: Any, rows: Sequence[Row], batch_size: int) -> float:
    """The model's mean loss a labelled token of rows, in nats."""
    total, loss = torch.zeros((), dtype=torch.float64), LanguageModelLoss(model)
    with torch.no_grad(), evaluating(model):
        for part in batches(sorted(rows, key=lambda row: len(row.input_ids)), batch_size):
            batch = {name: value.to(model.device) for name, value in collate(part, pad_token_id(tokenizer)).items()}
            total += loss(batch).double().cpu()
    return total.item() / sum(row.labelled for row in rows)


def exact_match(answers: Sequence[str], references: Sequence[str]) -> float:
    """Fraction of answers equal to their reference, white space at the ends aside."""
    pairs = zip(answers, references, strict=True)
    return sum(answer.strip() == reference.strip() for answer, reference in pairs) / len(references)


def rouge(answers: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, without stemming; 0 to 1.

    Raises:
        ModuleNotFoundError: the package rouge-score is missing.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE)
    scores = [scorer.score(reference, answer) for answer, reference in zip(answers, references, strict=True)]
    return {name: sum(score[name].fmeasure for score in scores) / len(scores) for name in ROUGE}
