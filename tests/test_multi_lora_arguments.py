"""multi_lora's arguments: wrong ones are named, by the functions, under autocast too."""

from typing import Any

import pytest
import torch
from test_multi_lora import make_mixed
from test_multi_lora_shared import columns_of, make_shared
from torch import Tensor

from fastlora.functional import RowGroups, group_rows, multi_lora, multi_lora_shared

NAN, INF = float("nan"), float("inf")


def right_arguments() -> dict[str, Any]:
    mixed = make_mixed([0, 1, -1, 1, 0, 0], [4, 2], K=16, N=12)
    return {**mixed._asdict(), "dy": None}


def adapters(*shapes: tuple[int, int], dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    return [torch.ones(shape, dtype=dtype, device=device) for shape in shapes]


A, B = ((4, 16), (2, 16)), ((12, 4), (12, 2))
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "x: a list": ("x", {"x": [1.0]}),
    "x: integers": ("x", {"x": torch.ones(6, 16, dtype=torch.int64)}),
    "x: no dimension": ("x", {"x": torch.tensor(1.0)}),
    "x: on meta": ("weight", {"x": torch.ones(6, 16, device="meta")}),
    "x: another K": ("weight", {"x": torch.ones(6, 15)}),
    "x: another M": ("index", {"x": torch.ones(7, 16)}),
    "weight: None": ("weight", {"weight": None}),
    "weight: transposed": ("weight", {"weight": torch.ones(16, 12)}),
    "weight: dtype": ("weight", {"weight": torch.ones(12, 16, dtype=torch.float16)}),
    "weight: on meta": ("weight", {"weight": torch.ones(12, 16, device="meta")}),
    "weight: requires grad": ("weight", {"weight": torch.ones(12, 16, requires_grad=True)}),
    "bias: another N": ("bias", {"bias": torch.ones(11)}),
    "bias: requires grad": ("bias", {"bias": torch.ones(12, requires_grad=True)}),
    "lora_a: None": ("lora_a", {"lora_a": None}),
    "lora_a: a tensor": ("lora_a", {"lora_a": torch.ones(2, 4, 16)}),
    "lora_a: empty": ("lora_a", {"lora_a": [], "lora_b": [], "scale": []}),
    "lora_a: None inside": ("lora_a[1]", {"lora_a": [torch.ones(4, 16), None]}),
    "lora_a: another K": ("lora_a[1]", {"lora_a": adapters((4, 16), (2, 15))}),
    "lora_a: 1-D": ("lora_a[0]", {"lora_a": [torch.ones(16), torch.ones(2, 16)]}),
    "lora_a: rank 0": ("lora_a[1]", {"lora_a": adapters((4, 16), (0, 16)), "lora_b": adapters((12, 4), (12, 0))}),
    "lora_a: dtype": (
        "lora_a[0]",
        {"lora_a": adapters(*A, dtype=torch.float16), "lora_b": adapters(*B, dtype=torch.float16)},
    ),
    "lora_a: on meta": ("lora_a[0]", {"lora_a": adapters(*A, device="meta")}),
    "lora_b: a tensor": ("lora_b", {"lora_b": torch.ones(2, 12, 4)}),
    "lora_b: too few": ("lora_b", {"lora_b": adapters((12, 4))}),
    "lora_b: another rank": ("lora_b[1]", {"lora_b": adapters((12, 4), (12, 4))}),
    "lora_b: another N": ("lora_b[0]", {"lora_b": adapters((11, 4), (11, 2))}),
    "lora_b: dtype": ("lora_b[0]", {"lora_b": adapters(*B, dtype=torch.float64)}),
    "scale: a number": ("scale", {"scale": 1.0}),
    "scale: a tensor": ("scale", {"scale": torch.ones(2)}),
    "scale: too many": ("scale", {"scale": [1.0, 1.0, 1.0]}),
    "scale: NaN": ("scale[1]", {"scale": [1.0, NAN]}),
    "scale: infinite": ("scale[0]", {"scale": [INF, 1.0]}),
    "scale: a tensor inside": ("scale[0]", {"scale": [torch.tensor(1.0), 1.0]}),
    "index: None": ("index", {"index": None}),
    "index: a list": ("index", {"index": [0, 1, -1, 1, 0, 0]}),
    "index: floats": ("index", {"index": torch.zeros(6)}),
    "index: bools": ("index", {"index": torch.zeros(6, dtype=torch.bool)}),
    "index: too long": ("index", {"index": torch.zeros(12, dtype=torch.int64)}),
    "index: no dimension": ("index", {"index": torch.tensor(0)}),
    "index: 2-D": ("index", {"index": torch.zeros(6, 1, dtype=torch.int64)}),
    "index: too large": ("index", {"index": torch.tensor([0, 1, 2, 0, 0, 0])}),
    "index: below -1": ("index", {"index": torch.tensor([0, 1, -2, 0, 0, 0])}),
    "index: far out of range": ("index", {"index": torch.tensor([0, 1, 2**62, 0, 0, 0])}),
    "index: on meta": ("index", {"index": torch.zeros(6, dtype=torch.int64, device="meta")}),
    "index: groups of other adapters": ("index", {"index": RowGroups(torch.zeros(6, dtype=torch.int64), 3)}),
    "index: groups of other rows": ("index", {"index": RowGroups(torch.zeros(4, dtype=torch.int64), 2)}),
    "index: groups of no rows": ("index", {"index": RowGroups(torch.zeros(0, dtype=torch.int64), 2)}),
    "index: groups on meta": ("index", {"index": RowGroups(torch.zeros(6, dtype=torch.int64, device="meta"), 2)}),
    "dropout_p: None": ("dropout_p", {"dropout_p": None}),
    "dropout_p: a tensor": ("dropout_p", {"dropout_p": torch.tensor(0.1)}),
    "dropout_p: too few": ("dropout_p", {"dropout_p": [0.1]}),
    "dropout_p: above 1": ("dropout_p[1]", {"dropout_p": [0.1, 1.1]}),
    "dropout_p: NaN": ("dropout_p", {"dropout_p": NAN}),
    "dropout_p: a string inside": ("dropout_p[0]", {"dropout_p": ["0.1", 0.1]}),
}


def expect_named(name: str, arguments: dict[str, Any]) -> None:
    start = name.replace("[", r"\[").replace("]", r"\]")
    with pytest.raises((IndexError, TypeError, ValueError), match=rf"^{start}(\[\d+\])?: .*expected"):
        multi_lora(**{key: value for key, value in arguments.items() if key != "dy"})


@pytest.mark.parametrize(("name", "changes"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(name: str, changes: dict[str, Any]) -> None:
    expect_named(name, {**right_arguments(), **changes})


@pytest.mark.parametrize("case", [case for case in WRONG if case != "weight: dtype"])
def test_wrong_arguments_under_autocast(case: str) -> None:
    name, changes = WRONG[case]
    with torch.autocast("cpu", torch.bfloat16):
        expect_named(name, {**right_arguments(), **changes})


def test_groups_must_fit_the_examples() -> None:
    """Groups of 2 examples are none for an x of 4 examples, though 2 divides its number of rows."""
    mixed = make_mixed([0] * 12, [4, 2], K=16, N=12)
    with pytest.raises(ValueError, match="^index: "):
        multi_lora(mixed.x.view(4, 3, 16), *mixed[1:6], group_rows(torch.tensor([0, 1]), 2))


@pytest.mark.parametrize(("dtype", "adapters"), [(torch.uint8, 2), (torch.int8, 200), (torch.int32, 2)])
def test_an_index_of_any_integers(dtype: torch.dtype, adapters: int) -> None:
    """Also of those that do not reach from -1 to the number of adapters."""
    order, offsets = group_rows(torch.tensor([1, 0, 1], dtype=dtype), adapters).for_rows(3)
    assert order.tolist() == [1, 0, 2] and offsets.tolist() == [0, 0, 1, *[3] * adapters]


@pytest.mark.parametrize("index", [None, [0, 1], torch.zeros(3), torch.zeros(3, dtype=torch.bool)], ids=str)
def test_group_rows_wants_integers(index: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="^index: got .*expected an integer tensor"):
        group_rows(index, 2)


def test_group_rows_says_which_numbers_there_are() -> None:
    with pytest.raises(IndexError, match="^index: expected numbers from -1 to 1 "):
        group_rows(torch.tensor([0, 2]), 2)


@pytest.mark.parametrize("adapters", [0, -1, 1.5, None], ids=str)
def test_group_rows_wants_a_number_of_adapters(adapters: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="^adapters: "):
        group_rows(torch.zeros(3, dtype=torch.int64), adapters)


def test_layers_that_share_x_name_the_wrong_one() -> None:
    layers = make_shared([0, 1, 0], [[4, 2]] * 2, [12, 6], K=16)
    c = columns_of(layers)
    right = {name: c[name] for name in ("weight", "bias", "lora_a", "lora_b", "scale")}
    short = [c["lora_a"][1][0], torch.ones(2, 15)]
    for changes, message in (
        ({"lora_a": [c["lora_a"][0], short]}, r"^lora_a\[1\]\[1\]: got float32 \[2, 15\]"),
        ({"lora_b": [c["lora_b"][0]]}, "^lora_b: got '1 entries', expected one for each of the 2 weights"),
        ({"scale": [[1.0, 1.0], [1.0]]}, r"^scale\[1\]: "),
        ({"dropout_p": [0.1, [0.1, 2.0]]}, r"^dropout_p\[1\]\[1\]: "),
        (
            {name: [c[name][0], c[name][1][:1]] for name in ("lora_a", "lora_b", "scale")},
            r"^lora_a\[1\]: got '1 adapters', expected 2, as lora_a\[0\] has",
        ),
        ({"index": torch.tensor([0, 2, 0])}, "^index: "),
    ):
        arguments = {**right, "index": layers[0].index, **changes}
        with pytest.raises((IndexError, ValueError), match=message):
            multi_lora_shared(layers[0].x, **arguments)
