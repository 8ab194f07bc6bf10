"""lora_linear's arguments: wrong ones are named, by the functions, under autocast too."""

from typing import Any

import pytest
import torch
from bounds import make_layer

from fastlora.functional import lora_linear, lora_linear_shared, multi_lora


def right_arguments() -> dict[str, Any]:
    x, weight, bias, lora_a, lora_b, _ = make_layer(6, 16, 12, 4)
    return {"x": x, "weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b, "scale": 2.0, "dropout_p": 0.1}


NAN, INF = float("nan"), float("inf")
WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "x: a list": ("x", {"x": [1.0]}),
    "x: None": ("x", {"x": None}),
    "x: integers": ("x", {"x": torch.ones(6, 16, dtype=torch.int64)}),
    "x: no dimension": ("x", {"x": torch.tensor(1.0)}),
    "x: on meta": ("weight", {"x": torch.ones(6, 16, device="meta")}),
    "x: another K": ("weight", {"x": torch.ones(6, 15)}),
    "weight: None": ("weight", {"weight": None}),
    "weight: 1-D": ("weight", {"weight": torch.ones(16)}),
    "weight: no dimension": ("weight", {"weight": torch.tensor(1.0)}),
    "weight: transposed": ("weight", {"weight": torch.ones(16, 12)}),
    "weight: dtype": ("weight", {"weight": torch.ones(12, 16, dtype=torch.float16)}),
    "weight: quantised": ("weight", {"weight": torch.ones(12, 16, dtype=torch.int8)}),
    "weight: on meta": ("weight", {"weight": torch.ones(12, 16, device="meta")}),
    "weight: requires grad": ("weight", {"weight": torch.ones(12, 16, requires_grad=True)}),
    "bias: a number": ("bias", {"bias": 1.0}),
    "bias: 2-D": ("bias", {"bias": torch.ones(1, 12)}),
    "bias: another N": ("bias", {"bias": torch.ones(11)}),
    "bias: dtype": ("bias", {"bias": torch.ones(12, dtype=torch.float64)}),
    "bias: on meta": ("bias", {"bias": torch.ones(12, device="meta")}),
    "bias: requires grad": ("bias", {"bias": torch.ones(12, requires_grad=True)}),
    "lora_a: None": ("lora_a", {"lora_a": None}),
    "lora_a: 1-D": ("lora_a", {"lora_a": torch.ones(16)}),
    "lora_a: another K": ("lora_a", {"lora_a": torch.ones(4, 15)}),
    "lora_a: rank 0": ("lora_a", {"lora_a": torch.ones(0, 16), "lora_b": torch.ones(12, 0)}),
    "lora_a: dtype": ("lora_a", {"lora_a": torch.ones(4, 16).bfloat16(), "lora_b": torch.ones(12, 4).bfloat16()}),
    "lora_a: integers": ("lora_a", {"lora_a": torch.ones(4, 16).int()}),
    "lora_a: on meta": ("lora_a", {"lora_a": torch.ones(4, 16, device="meta")}),
    "lora_b: None": ("lora_b", {"lora_b": None}),
    "lora_b: another rank": ("lora_b", {"lora_b": torch.ones(12, 5)}),
    "lora_b: another N": ("lora_b", {"lora_b": torch.ones(11, 4)}),
    "lora_b: 3-D": ("lora_b", {"lora_b": torch.ones(12, 4, 1)}),
    "lora_b: dtype": ("lora_b", {"lora_b": torch.ones(12, 4).bfloat16()}),
    "lora_b: on meta": ("lora_b", {"lora_b": torch.ones(12, 4, device="meta")}),
    "scale: None": ("scale", {"scale": None}),
    "scale: a string": ("scale", {"scale": "2"}),
    "scale: a tensor": ("scale", {"scale": torch.tensor(2.0)}),
    "scale: NaN": ("scale", {"scale": NAN}),
    "scale: infinite": ("scale", {"scale": -INF}),
    "dropout_p: negative": ("dropout_p", {"dropout_p": -0.1}),
    "dropout_p: above 1": ("dropout_p", {"dropout_p": 1.1}),
    "dropout_p: NaN": ("dropout_p", {"dropout_p": NAN}),
    "dropout_p: None": ("dropout_p", {"dropout_p": None}),
}


CAST_AWAY = {"weight: dtype", "bias: dtype", "lora_a: dtype", "lora_b: dtype"}


@pytest.mark.parametrize(("name", "changes"), WRONG.values(), ids=WRONG)
def test_wrong_arguments(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{name}: .*expected"):
        lora_linear(**{**right_arguments(), **changes})


@pytest.mark.parametrize("case", [case for case in WRONG if case not in CAST_AWAY])
def test_wrong_arguments_under_autocast(case: str) -> None:
    """What autocast does not cast is as wrong as without it."""
    name, changes = WRONG[case]
    with torch.autocast("cpu", torch.bfloat16), pytest.raises((TypeError, ValueError), match=rf"^{name}: .*expected"):
        lora_linear(**{**right_arguments(), **changes})


def test_layers_that_share_x_name_the_wrong_one() -> None:
    one, other = make_layer(4, 8, 6, 2), make_layer(4, 8, 5, 2)
    with pytest.raises(ValueError, match=r"lora_a\[1\]: got float32 \[2, 9\]"):
        lora_linear_shared(
            one.x,
            [one.weight, other.weight],
            [None, None],
            [one.lora_a, torch.ones(2, 9)],
            [one.lora_b, other.lora_b],
            [1.0, 1.0],
        )
    with pytest.raises(ValueError, match="weight: got '0 entries', expected one for each of the 0 weights, at least 1"):
        lora_linear_shared(one.x, [], [], [], [], [])
    with pytest.raises(ValueError, match="lora_b: got '1 entries', expected one for each of the 2 weights"):
        lora_linear_shared(one.x, [one.weight] * 2, [None] * 2, [one.lora_a] * 2, [one.lora_b], [1.0, 1.0])


def test_all_adapters_have_one_dtype() -> None:
    """x's or float32, but not one of them this and another that."""
    x, weight, _, a, b, _ = make_layer(4, 8, 6, 2, torch.bfloat16)
    frozen, mixed = ([weight] * 2, [None] * 2), ([a, a.float()], [b, b.float()])
    with pytest.raises(ValueError, match=r"^lora_a\[1\]: got float32 .*the dtype of lora_a\[0\], torch.bfloat16"):
        lora_linear_shared(x, *frozen, *mixed, [1.0, 1.0])
    with pytest.raises(ValueError, match=r"^lora_a\[1\]: got float32 .*the dtype of lora_a\[0\], torch.bfloat16"):
        multi_lora(x, weight, None, *mixed, [1.0, 1.0], torch.zeros(4, dtype=torch.int64))


def test_autocast_makes_the_dtypes_of_the_frozen_part_one() -> None:
    x, weight, bias, a, b, _ = make_layer(4, 8, 6, 2)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, weight.half(), bias.double(), a, b, 1.0)
        assert torch.equal(y, lora_linear(x, weight.half().bfloat16(), bias, a, b, 1.0)) and y.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="^weight: .*x's dtype"):
        lora_linear(x, weight.half(), bias, a, b, 1.0)
