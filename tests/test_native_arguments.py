"""lora_linear's native operators, called wrongly when no one checks before them: they raise, naming the argument, and none ends the process."""

from typing import Any

import pytest
import torch
from bounds import make_layer, print_accepted, run_apart
from conftest import implementations
from test_lora_linear_arguments import NAN, WRONG, right_arguments
from torch import Tensor

from fastlora.functional import group_rows

Wrong = dict[str, tuple[str, dict[str, Any]]]
WRONG_RAW: Wrong = {
    case: (name, changes)
    for case, (name, changes) in WRONG.items()
    if name not in ("scale", "dropout_p") and not case.endswith(("None", "on meta", "requires grad"))
}
WRONG_SEED: Wrong = {
    "seed: dtype": ("seed", {"seed": torch.tensor([1], dtype=torch.int32)}),
    "seed: empty": ("seed", {"seed": torch.ones(0, dtype=torch.int64)}),
    "seed: of two layers": ("seed", {"seed": torch.ones(2, dtype=torch.int64)}),
}
WRONG_BACKWARD: Wrong = {
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
    "keep: signed": ("keep", {"keep": torch.ones(1, 6, 8, dtype=torch.int8)}),
    "keep: floats": ("keep", {"keep": torch.ones(1, 6, 8)}),
    "keep: one layer's": ("keep", {"keep": torch.ones(6, 8, dtype=torch.uint8)}),
    "keep: another G": ("keep", {"keep": torch.ones(2, 6, 8, dtype=torch.uint8)}),
    "keep: another M": ("keep", {"keep": torch.ones(1, 5, 8, dtype=torch.uint8)}),
    "keep: too few bytes": ("keep", {"keep": torch.ones(1, 6, 7, dtype=torch.uint8)}),
    "keep: far too few bytes": ("keep", {"keep": torch.ones(1, 6, 2, dtype=torch.uint8)}),
    "keep: 1-D": ("keep", {"keep": torch.ones(48, dtype=torch.uint8)}),
    "keep: 4-D": ("keep", {"keep": torch.ones(1, 1, 6, 8, dtype=torch.uint8)}),
    "keep: a seed": ("keep", {"keep": torch.tensor(1)}),
    "dx: another M": ("dx", {"dx": torch.ones(5, 16)}),
    "dx: another K": ("dx", {"dx": torch.ones(6, 15)}),
    "dx: 1-D": ("dx", {"dx": torch.ones(16)}),
    "dx: dtype": ("dx", {"dx": torch.ones(6, 16).bfloat16()}),
    "dx: rows with gaps": ("dx", {"dx": torch.ones(6, 32)[:, ::2]}),
}
WRONG_Y: Wrong = {
    "y: no layer": ("y: ", {"y": []}),
    "y: a number": ("y", {"y": [1.0]}),
    "y: 1-D": ("y", {"y": torch.ones(12)}),
    "y: another M": ("y", {"y": torch.ones(5, 12)}),
    "y: another N": ("lora_b", {"y": torch.ones(6, 11)}),
    "y: dtype": ("y", {"y": torch.ones(6, 12).bfloat16()}),
    "y: rows with gaps": ("y", {"y": torch.ones(6, 24)[:, ::2]}),
}
WRONG_FEW_ROWS: Wrong = {
    "x: no rows": ("x", {"x": torch.ones(0, 16)}),
    "x: nine rows": ("x", {"x": torch.ones(9, 16)}),
    "weight: gaps both ways": ("weight", {"weight": torch.ones(24, 32)[::2, ::2]}),
}
ORDER, OFFSETS = group_rows(torch.tensor([0, 1, -1, 1, 0, 0]), 2).for_rows(6)
WRONG_ORDER: Wrong = {
    "order: too short": ("order", {"order": ORDER[:5]}),
    "order: dtype": ("order", {"order": ORDER.int()}),
    "order: too large": ("order", {"order": ORDER + 1}),
    "order: negative": ("order", {"order": ORDER - 1}),
    "order: none": ("lora_a", {"order": None}),
    "offsets: too short": ("offsets", {"offsets": OFFSETS[:4]}),
    "offsets: dtype": ("offsets", {"offsets": OFFSETS.float()}),
    "offsets: beyond the rows": ("offsets", {"offsets": OFFSETS * 1000}),
    "offsets: falling": ("offsets", {"offsets": OFFSETS.flip(0)}),
    "offsets: none": ("offsets", {"offsets": None}),
}


def right_lists(adapters: int) -> dict[str, Any]:
    """What the operators take of one layer: one adapter for all rows, or two and the order of their rows."""
    ranks = (2, 4)[-adapters:]
    return {
        "lora_a": [torch.ones(r, 16) for r in ranks],
        "lora_b": [torch.ones(12, r) for r in ranks],
        "scale": [2.0] * adapters,
        "dropout_p": [0.0, 0.1][-adapters:],
        "order": ORDER if adapters > 1 else None,
        "offsets": OFFSETS if adapters > 1 else None,
    }


def wrong_lists(right: dict[str, Any]) -> Wrong:
    """Lists that are too short, too long or none, and numbers out of range."""
    scale, dropout_p = right["scale"], right["dropout_p"]
    halves = {name: [one.half() for one in right[name]] for name in ("lora_a", "lora_b")}
    twice = {name: right[name] * 2 for name in ("lora_a", "lora_b", "scale", "dropout_p")}
    wrong: Wrong = {
        "scale: too few": ("scale", {"scale": scale[:-1]}),
        "scale: too many": ("scale", {"scale": [*scale, 2.0]}),
        "dropout_p: too few": ("dropout_p", {"dropout_p": dropout_p[:-1]}),
        **{f"dropout_p: {value}": ("dropout_p", {"dropout_p": [*dropout_p[:-1], value]}) for value in (-0.1, 1.1, NAN)},
        "lora_a: a tensor": ("lora_a", {"lora_a": torch.stack([torch.ones(4, 16)] * 2)}),
        "lora_a: none": ("lora_a", {name: [] for name in twice}),
        "lora_a: too few": ("lora_a", {name: [] for name in twice if name != "dropout_p"}),
        "lora_a: twice as many": ("lora_a", {**twice, "order": None, "offsets": None}),
        "lora_a: all in 16 bits": ("lora_a", halves),
        "lora_b: a tensor": ("lora_b", {"lora_b": torch.stack([torch.ones(12, 4)] * 2)}),
        "lora_b: too few": ("lora_b", {"lora_b": right["lora_b"][:-1]}),
    }
    return wrong | (WRONG_ORDER if right["order"] is not None else {})


def in_lists(wrong: Wrong, right: dict[str, Any]) -> Wrong:
    """The same of the last adapter, or the last layer, where the operator takes a list."""

    def listed(name: str, value: Any) -> Any:
        return [*right[name][:-1], value] if isinstance(right[name], list) and isinstance(value, Tensor) else value

    return {
        case: (name, {key: listed(key, value) for key, value in changes.items()})
        for case, (name, changes) in wrong.items()
    }


def call_the_native_operators_wrongly() -> None:
    right = {name: value.detach() if isinstance(value, Tensor) else value for name, value in right_arguments().items()}
    del right["dropout_p"]
    print_accepted("few_rows_lora_cpu", right, WRONG_RAW | WRONG_FEW_ROWS)
    for adapters in (1, 2):
        lists = right_lists(adapters)
        scaled = {name: value for name, value in lists.items() if name != "dropout_p"}
        wrong = {case: row for case, row in wrong_lists(lists).items() if not case.startswith("dropout_p")}
        few_rows = {"x": right["x"], "weight": right["weight"], "bias": right["bias"], **scaled}
        wrong = {
            case: (name, {key: value for key, value in changes.items() if key in few_rows})
            for case, (name, changes) in wrong.items()
        }
        print_accepted("few_rows_mixed_cpu", few_rows, in_lists(WRONG_RAW | WRONG_FEW_ROWS, few_rows) | wrong)
        call_the_updates_wrongly(right["x"], lists)


def call_the_updates_wrongly(x: Tensor, lists: dict[str, Any]) -> None:
    wrong = {case: row for case, row in WRONG_RAW.items() if row[0] not in ("weight", "bias")}
    wrong |= {"x: another K": ("lora_a", {"x": torch.ones(6, 15)})}
    too_many = {name: [torch.ones(6, 12)] * (len(lists["scale"]) + 1) for name in ("y", "dy")}
    adapters = {"x": x, "lora_a": lists["lora_a"], "lora_b": lists["lora_b"]}
    numbers = {"scale": lists["scale"], "dropout_p": lists["dropout_p"]}
    rows = {"order": lists["order"], "offsets": lists["offsets"]}
    update = {"y": [torch.ones(6, 12)], **adapters, **numbers, "seed": torch.tensor([1]), **rows}
    print_accepted("lora_update_cpu", update, in_lists(wrong | WRONG_Y | WRONG_SEED, update) | wrong_lists(lists))
    print_accepted("lora_update_cpu", update, {"y: more layers than adapters": ("lora_a", {"y": too_many["y"]})})
    state = {"xa": torch.ones(1, 6, 4), "keep": torch.ones(1, 6, 8, dtype=torch.uint8)}
    need = {"need_da": True, "need_db": True}
    given = {"dx": torch.ones(6, 16), "dy": [torch.ones(6, 12)], **adapters, **state, **numbers, **rows, **need}
    print_accepted("lora_update_backward_cpu", given, in_lists(wrong | WRONG_BACKWARD, given) | wrong_lists(lists))
    print_accepted("lora_update_backward_cpu", {**given, "keep": torch.empty(0, dtype=torch.uint8)}, {
        "dy: none": ("dy: ", {"dy": []}), "dy: more layers than adapters": ("lora_a", {"dy": too_many["dy"]}),
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
    assert run_apart("test_native_arguments", call_the_native_operators_wrongly) == ""
    assert run_apart("test_native_arguments", call_the_operator_wrongly) == ""
