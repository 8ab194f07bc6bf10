"""lora_linear's arguments: wrong ones are named, by the functions and by the native operators, under autocast too."""

from typing import Any

import pytest
import torch
from bounds import make_layer, print_accepted, run_apart
from conftest import implementations
from torch import Tensor

from fastlora.functional import lora_linear, lora_linear_shared


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


WRONG_RAW = {
    case: (name, changes)
    for case, (name, changes) in WRONG.items()
    if name not in ("scale", "dropout_p") and not case.endswith(("None", "on meta", "requires grad"))
}
WRONG_SEED = {
    "seed: dtype": ("seed", {"seed": torch.tensor([1], dtype=torch.int32)}),
    "seed: empty": ("seed", {"seed": torch.ones(0, dtype=torch.int64)}),
    "seed: of two layers": ("seed", {"seed": torch.ones(2, dtype=torch.int64)}),
}
WRONG_BACKWARD = {
    "dy: another N": ("lora_b", {"dy": torch.ones(6, 11)}),
    "dy: another M": ("dy", {"dy": torch.ones(5, 12)}),
    "dy: 1-D": ("dy", {"dy": torch.ones(12)}),
    "dy: dtype": ("dy", {"dy": torch.ones(6, 12).bfloat16()}),
    "xa: another rank": ("xa", {"xa": torch.ones(1, 6, 3)}),
    "xa: another M": ("xa", {"xa": torch.ones(1, 5, 4)}),
    "xa: another G": ("xa", {"xa": torch.ones(2, 6, 4)}),
    "xa: 2-D": ("xa", {"xa": torch.ones(6, 4)}),
    "xa: dtype": ("xa", {"xa": torch.ones(1, 6, 4).bfloat16()}),
    "keep: dtype": ("keep", {"keep": torch.ones(1, 6, 8, dtype=torch.bool)}),
    "keep: floats": ("keep", {"keep": torch.ones(1, 6, 8)}),
    "keep: one layer's": ("keep", {"keep": torch.ones(6, 8, dtype=torch.uint8)}),
    "keep: another G": ("keep", {"keep": torch.ones(2, 6, 8, dtype=torch.uint8)}),
    "keep: another M": ("keep", {"keep": torch.ones(1, 5, 8, dtype=torch.uint8)}),
    "keep: too few bytes": ("keep", {"keep": torch.ones(1, 6, 7, dtype=torch.uint8)}),
    "keep: far too few bytes": ("keep", {"keep": torch.ones(1, 6, 2, dtype=torch.uint8)}),
    "keep: 4-D": ("keep", {"keep": torch.ones(1, 1, 6, 8, dtype=torch.uint8)}),
    "keep: a seed": ("keep", {"keep": torch.tensor(1)}),
    "dx: another M": ("dx", {"dx": torch.ones(5, 16)}),
    "dx: another K": ("dx", {"dx": torch.ones(6, 15)}),
    "dx: 1-D": ("dx", {"dx": torch.ones(16)}),
    "dx: dtype": ("dx", {"dx": torch.ones(6, 16).bfloat16()}),
    "dx: rows with gaps": ("dx", {"dx": torch.ones(6, 32)[:, ::2]}),
}
WRONG_Y = {
    "y: no layer": ("y: ", {"y": []}),
    "y: a number": ("y", {"y": [1.0]}),
    "y: 1-D": ("y", {"y": [torch.ones(12)]}),
    "y: another M": ("y", {"y": [torch.ones(5, 12)]}),
    "y: another N": ("lora_b", {"y": [torch.ones(6, 11)]}),
    "y: dtype": ("y", {"y": [torch.ones(6, 12).bfloat16()]}),
    "y: rows with gaps": ("y", {"y": [torch.ones(6, 24)[:, ::2]]}),
    "y: two layers": ("lora_a", {"y": [torch.ones(6, 12)] * 2}),
}
WRONG_NUMBERS = {
    "scale: too few": ("scale", {"scale": []}),
    "scale: too many": ("scale", {"scale": [1.0, 2.0]}),
    "dropout_p: too few": ("dropout_p", {"dropout_p": []}),
    "dropout_p: negative": ("dropout_p", {"dropout_p": [-0.1]}),
    "dropout_p: above 1": ("dropout_p", {"dropout_p": [1.1]}),
    "dropout_p: NaN": ("dropout_p", {"dropout_p": [NAN]}),
    "lora_b: too few": ("lora_b", {"lora_b": []}),
    "lora_a: none": ("lora_a", {"lora_a": [], "lora_b": [], "scale": [], "dropout_p": []}),
    "lora_a: two for one layer": (
        "lora_a",
        {
            "lora_a": [torch.ones(4, 16)] * 2,
            "lora_b": [torch.ones(12, 4)] * 2,
            "scale": [1.0] * 2,
            "dropout_p": [0.1] * 2,
        },
    ),
}
LISTED = ("y", "dy", "lora_a", "lora_b")


def listed(wrong: dict[str, tuple[str, dict[str, Any]]]) -> dict[str, tuple[str, dict[str, Any]]]:
    """The same of one layer, in lists. An x of another K is what A does not fit."""
    return {
        case: (
            "lora_a" if case == "x: another K" else name,
            {key: [value] if key in LISTED and isinstance(value, Tensor) else value for key, value in changes.items()},
        )
        for case, (name, changes) in wrong.items()
    }


def call_the_native_operators_wrongly() -> None:
    right = {name: value.detach() if isinstance(value, Tensor) else value for name, value in right_arguments().items()}
    del right["dropout_p"]
    print_accepted("few_rows_lora_cpu", right, WRONG_RAW)
    print_accepted("few_rows_lora_cpu", right, {
        "x: no rows": ("x", {"x": torch.ones(0, 16)}),
        "x: nine rows": ("x", {"x": torch.ones(9, 16)}),
        "weight: gaps both ways": ("weight", {"weight": torch.ones(24, 32)[::2, ::2]}),
    })  # fmt: skip
    wrong = {case: (name, changes) for case, (name, changes) in WRONG_RAW.items() if name not in ("weight", "bias")}
    wrong = listed(wrong | {"x: another K": WRONG_RAW["x: another K"]})
    adapters = {"x": right["x"], "lora_a": [right["lora_a"]], "lora_b": [right["lora_b"]]}
    numbers = {"scale": [2.0], "dropout_p": [0.1]}
    nobody = {"order": None, "offsets": None}
    update = {"y": [torch.ones(6, 12)], **adapters, **numbers, "seed": torch.tensor([1]), **nobody}
    print_accepted("lora_update_cpu", update, wrong | WRONG_Y | WRONG_NUMBERS | WRONG_SEED)
    state = {"xa": torch.ones(1, 6, 4), "keep": torch.ones(1, 6, 8, dtype=torch.uint8)}
    need = {"need_da": True, "need_db": True}
    given = {"dx": torch.ones(6, 16), "dy": [torch.ones(6, 12)], **adapters, **state, **numbers, **nobody, **need}
    print_accepted("lora_update_backward_cpu", given, wrong | WRONG_NUMBERS | listed(WRONG_BACKWARD))
    print_accepted("lora_update_backward_cpu", {**given, "keep": torch.empty(0, dtype=torch.uint8)}, {
        "dy: none": ("dy: ", {"dy": []}), "dy: two layers": ("lora_a", {"dy": [torch.ones(6, 12)] * 2}),
    })  # fmt: skip


def call_the_operator_wrongly() -> None:
    """What multiplies names x, weight or bias, be the rows few or many; where there is nothing to choose by, torch raises in its own words."""
    wrong = {case: row for case, row in WRONG_RAW.items() if row[0] in ("x", "weight", "bias")}
    for case in ("x: integers", "weight: 1-D", "weight: no dimension"):
        wrong[case] = ("", wrong[case][1])
    wrong = {case: (name, {key: [value] if key != "x" else value for key, value in changes.items()})
             for case, (name, changes) in wrong.items()}  # fmt: skip
    for rows in (6, 40):
        x, weight, bias, lora_a, lora_b, dy = (tensor.detach() for tensor in make_layer(rows, 16, 12, 4))
        adapters = {"lora_a": [lora_a], "lora_b": [lora_b]}
        drawn = {"scale": [2.0], "dropout_p": [0.1], "seed": None, "order": None, "offsets": None}
        print_accepted("lora_linear", {"x": x, "weight": [weight], "bias": [bias], **adapters, **drawn}, wrong)


@pytest.mark.skipif("cpu" not in implementations("lora_linear", "cpu"), reason="the native extension is not built")
def test_wrong_arguments_to_the_native_operators() -> None:
    """They raise, naming the argument, also when no one checks before them; none ends the process."""
    assert run_apart("test_lora_linear_arguments", call_the_native_operators_wrongly) == ""
    assert run_apart("test_lora_linear_arguments", call_the_operator_wrongly) == ""


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
    with pytest.raises(ValueError, match="lora_b: got '1 entries', expected one for each of the 2 weights"):
        lora_linear_shared(one.x, [one.weight] * 2, [None] * 2, [one.lora_a] * 2, [one.lora_b], [1.0, 1.0])
