"""packing.py: which batches run without their padding, as what, and which models give the same then. What models make of it is test_fusion.py's."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastlora import packing

MASK = torch.tensor([[1, 1, 1, 0], [0, 0, 1, 2]])
IDS = torch.arange(8).view(2, 4)
GIVEN = {"input_ids": IDS, "attention_mask": MASK}
WORDS = 50
MODEL = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"labels": IDS, "position_ids": IDS, "shift_labels": IDS, "num_items_in_batch": 3, "return_dict": True},
        {"use_cache": False},
        {"use_cache": None, "inputs_embeds": None},
    ],
)
def test_a_padded_batch_has_real_tokens(more: dict[str, Any]) -> None:
    found = packing.real_tokens(MODEL, {**GIVEN, **more})
    assert found is not None and torch.equal(found, MASK != 0)


@pytest.mark.parametrize(
    "more",
    [
        {"input_ids": None},
        {"attention_mask": None},
        {"attention_mask": torch.ones(2, 4)},
        {"attention_mask": torch.zeros(2, 4)},
        {"attention_mask": MASK[:, None, None]},
        {"attention_mask": MASK[:, :3]},
        {"input_ids": IDS.to("meta")},
        {"use_cache": True},
        {"inputs_embeds": torch.ones(2, 4, 3)},
        {"past_key_values": object()},
    ],
    ids=lambda more: "".join(more),
)
def test_other_batches_stay_as_they_are(more: dict[str, Any]) -> None:
    assert packing.real_tokens(MODEL, {**GIVEN, **more}) is None
    assert packing.real_tokens(MODEL, {}) is None


def test_what_torch_compiles_keeps_its_padding() -> None:
    """The model, or any part of it, in either way."""
    whole, part = copy.deepcopy(MODEL), copy.deepcopy(MODEL)
    whole.compile()
    part[1][0].compile()
    wrapped = nn.Sequential(nn.Linear(2, 2), torch.compile(nn.Linear(2, 2)))
    for model in (whole, part, wrapped):
        assert packing.real_tokens(model, GIVEN) is None
    assert packing.is_compiled(whole) and not packing.is_compiled(part)


@pytest.mark.parametrize("positions", [None, torch.arange(4)[None] * 2, IDS + 3], ids=["", "one row", "all rows"])
def test_one_row_of_the_real_tokens(positions: Tensor | None) -> None:
    real = MASK != 0
    own = torch.arange(4) if positions is None else positions
    packed = packing.pack(
        {**GIVEN, "labels": IDS - 1, "shift_labels": None, "position_ids": positions, "return_dict": True}, real
    )
    expected = {
        "input_ids": [[0, 1, 2, 6, 7]],
        "labels": [[-1, 0, 1, 5, 6]],
        "position_ids": [own.expand(2, 4)[real].tolist()],
        "cu_seq_lens_q": [0, 3, 5],
        "cu_seq_lens_k": [0, 3, 5],
    }
    assert {name: packed[name].tolist() for name in expected} == expected
    assert packed["cu_seq_lens_q"].dtype == torch.int32  # as transformers has it
    assert {name: packed[name] for name in packed.keys() - expected.keys() - {"attention_mask"}} == {
        "shift_labels": None,
        "return_dict": True,
        "max_length_q": 3,
        "max_length_k": 3,
        "use_cache": False,
    }
    assert packed["attention_mask"].shape == (1, 1, 1, 1) and packed["attention_mask"].isnan().all()


def model(across: float = 0.0, packed_error: float = 0.0, padding_error: float = 0.0) -> Callable[..., Tensor]:
    """A causal model's logits: of each token, and of those before it in its row.

    across: what a token's logits have of the row before, where there is no padding. The errors: of all logits of such a batch, and of a padded one.
    """

    def logits_of(input_ids: Tensor, use_cache: bool, attention_mask: Tensor | None = None, **packed: Any) -> Tensor:
        assert not use_cache and not torch.is_grad_enabled()
        values = torch.nn.functional.one_hot(input_ids, WORDS).double()
        if not packed:
            error = 0.0 if attention_mask is None else padding_error
            return values.cumsum(1) + error
        lengths = packed["cu_seq_lens_q"].diff().tolist()
        assert packed["position_ids"].tolist() == [[place for length in lengths for place in range(length)]]
        rows = [row.cumsum(0) for row in values[0].split(lengths)]
        for row, before in zip(rows[1:], rows, strict=False):
            row += across * before.sum(0)
        return torch.cat(rows)[None] + packed_error

    return logits_of


def test_rows_that_do_not_know_of_one_another_are_exact() -> None:
    assert packing.is_exact(model(), WORDS)
    assert not packing.is_exact(model(across=1e-9), WORDS)


def test_the_logits_are_those_of_the_padded_batch() -> None:
    """But for rounding, or for four times what padding changes in the model itself."""
    assert packing.is_exact(model(packed_error=1e-3), WORDS)
    assert not packing.is_exact(model(packed_error=0.1), WORDS)
    noise = 0.125
    for times, expected in ((5, True), (-3, True), (5.5, False), (-3.5, False)):
        found = packing.is_exact(model(packed_error=times * noise, padding_error=noise), WORDS)
        assert found is expected, times


def test_logits_that_are_no_numbers_are_not_exact() -> None:
    assert not packing.is_exact(model(packed_error=torch.nan), WORDS)
    assert not packing.is_exact(model(padding_error=torch.nan), WORDS)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_another_number_of_logits_is_not_exact(packed: bool) -> None:
    own = model()

    def logits_of(**given: Any) -> Tensor:
        return own(**given)[..., : WORDS - (packed is ("cu_seq_lens_q" in given))]

    assert not packing.is_exact(logits_of, WORDS)


@pytest.mark.parametrize("fault", [*packing.UNFIT, AttributeError])
def test_a_model_that_cannot_do_with_it_is_not_exact(fault: type[Exception]) -> None:
    """What else it raises is its own fault, and is told."""

    def logits_of(**given: Any) -> Tensor:
        raise fault

    if fault in packing.UNFIT:
        assert not packing.is_exact(logits_of, WORDS)
    else:
        with pytest.raises(fault):
            packing.is_exact(logits_of, WORDS)
