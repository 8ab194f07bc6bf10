"""dora_factor: c = m / |W + s B A|, by both implementations, against the float64 reference."""

from typing import Any

import pytest
import quantised_weights
import torch
from bounds import assert_within_bound_over_inputs, dense, double, gapped, transposed
from torch import Tensor

from fastlora import ops, reference
from fastlora.frozen import quantised
from fastlora.functional import dora_factor
from fastlora.operators import dora_factor as operator
from fastlora.ops import Choice

SCALE = 1.5
Case = tuple[Tensor, Tensor, Tensor, Tensor]


@pytest.fixture(params=["reference", "blocks", "cpu"])
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Blocks are no implementation that can be forced for all operators: they run where neither plain PyTorch is, nor native code."""
    if request.param == "cpu" and not ops.has("dora_factor", "cpu"):
        pytest.skip("the extension is not built")
    if request.param == "blocks":
        monkeypatch.delitem(ops.implementations, ("dora_factor", "cpu"), raising=False)
    monkeypatch.setattr(ops, "forced", "reference" if request.param == "reference" else None)
    return request.param


@pytest.fixture(params=[False, True], ids=["whole", "blocks"])
def in_blocks(request, monkeypatch) -> None:
    if request.param:
        monkeypatch.setattr(operator, "ELEMENTS_AT_ONCE", {"cpu": 70})


def draw(N: int, K: int, R: int, dtype: torch.dtype, adapter: torch.dtype | None = None) -> Case:
    own = adapter or dtype
    magnitude, weight = torch.rand(N) + 0.5, torch.randn(N, K) / max(K, 1) ** 0.5
    lora_a, lora_b = torch.randn(R, K) / max(K, 1) ** 0.5, torch.randn(N, R) / R**0.5
    return magnitude.to(own), weight.to(dtype), lora_a.to(own), lora_b.to(own)


def eager(magnitude: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """As PEFT computes it with the adapter's weights in float32, to which it casts W."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    norm = torch.linalg.norm(weight.to(wide) + SCALE * (lora_b.to(wide) @ lora_a.to(wide)), dim=1)
    return magnitude / norm.detach()


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("layout", [lambda one: one, gapped, lambda one: transposed(one) if one.dim() == 2 else one],
                         ids=["dense", "gaps", "by column"])  # fmt: skip
@pytest.mark.parametrize(
    ("dtype", "adapter"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
    ],
    ids=str,
)
@pytest.mark.parametrize(("N", "K", "R"), [(33, 40, 3), (1, 1, 1), (7, 100, 16), (300, 5, 8)])
def test_bound(chosen, N, K, R, dtype, adapter, layout):
    def compute():
        given = [layout(one) for one in draw(N, K, R, dtype, adapter)]
        values = []
        for function, inputs in (
            (lambda *one: dora_factor(*one, SCALE), given),
            (eager, [dense(one) for one in given]),
            (eager, [double(one) for one in given]),
        ):
            m = inputs[0].detach().requires_grad_()
            factor = function(m, *inputs[1:])
            drawn = torch.randn(N, generator=torch.Generator().manual_seed(0)).to(factor)
            values.append((factor.detach(), *torch.autograd.grad(factor, m, drawn)))
        assert values[0][0].dtype == torch.float32 and values[0][1].dtype == adapter
        compared = ((a, b.to(a.dtype), c) for a, b, c in zip(*values, strict=True))
        return dict(zip(("factor", "dmagnitude"), compared, strict=True))

    assert_within_bound_over_inputs(compute)


@pytest.mark.usefixtures("in_blocks")
def test_an_adapter_that_takes_away_what_the_weight_has(chosen):
    """Where a sum of norms and products would cancel: the row is a thousandth of W's."""
    magnitude, weight, lora_a, lora_b = draw(20, 64, 4, torch.float32)
    weight = -SCALE * (lora_b @ lora_a) + 1e-3 * torch.randn(20, 64)
    found = dora_factor(magnitude, weight, lora_a, lora_b, SCALE)
    exact = eager(*(one.double() for one in (magnitude, weight, lora_a, lora_b)))
    assert torch.allclose(found.double(), exact, rtol=1e-3)


@pytest.mark.parametrize("panel", [2**21, 64 * 72])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", quantised_weights.KINDS)
def test_bound_of_a_quantised_weight(chosen, monkeypatch, kind, compute, panel):
    """Of what the product multiplies by; in panels of 64 rows as in one."""
    monkeypatch.setattr(quantised, "PANEL", panel)

    def bound():
        magnitude, _, lora_a, lora_b = draw(150, 72, 5, torch.float32)
        weight = quantised_weights.weight(kind, 150, 72, torch.float32, compute)
        whole = quantised_weights.dense(weight)
        given = magnitude, whole, lora_a, lora_b
        found = operator.apply(magnitude.requires_grad_(), weight, lora_a, lora_b, SCALE)
        assert found.dtype == torch.float32
        return {"factor": (found.detach(), eager(*given).detach(), eager(*map(double, given)).detach())}

    assert_within_bound_over_inputs(bound)
    if chosen != "reference":
        weight = quantised_weights.weight(kind, 150, 72, torch.float32)
        assert operator.choose(weight) == Choice("panels", f"{kind} dequantised a panel at a time")
        assert len(quantised.panels(weight, 0)) == (1 if panel > 150 * 72 else 3)


def test_gradcheck(chosen):
    """The norm counts as a constant: the magnitude alone has a gradient."""
    magnitude, *rest = draw(5, 6, 2, torch.float64)
    rest[1].requires_grad_(), rest[2].requires_grad_()
    assert torch.autograd.gradcheck(lambda m: dora_factor(m, *rest, SCALE), [magnitude.requires_grad_()])
    dora_factor(magnitude, *rest, SCALE).sum().backward()
    assert magnitude.grad is not None and rest[1].grad is rest[2].grad is None
    assert not dora_factor(magnitude.detach(), *rest, SCALE).requires_grad


def test_no_rows_and_no_columns(chosen):
    assert dora_factor(*draw(0, 4, 2, torch.float32), SCALE).shape == (0,)
    assert dora_factor(*draw(3, 0, 2, torch.float32), SCALE).isinf().all()


def test_autocast_leaves_it_alone(chosen):
    given = draw(9, 16, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = dora_factor(*given, SCALE)
    assert torch.equal(found, dora_factor(*given, SCALE))


@pytest.mark.parametrize("chosen", ["blocks"], indirect=True)
def test_nothing_as_large_as_the_weight_is_made(chosen, monkeypatch):
    """But for the room, which is as large as it is told to be."""
    monkeypatch.setattr(operator, "ELEMENTS_AT_ONCE", {"cpu": 640})
    made, empty = [], Tensor.new_empty

    def new_empty(self: Tensor, *shape: Any, **options: Any) -> Tensor:
        made.append(result := empty(self, *shape, **options))
        return result

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    dora_factor(*draw(100, 64, 4, torch.float32), SCALE)
    assert max(one.numel() for one in made) == 640


def test_compiles_whole(chosen):
    torch.compiler.reset()
    compiled = torch.compile(lambda *given: dora_factor(*given, SCALE), fullgraph=True, backend="aot_eager")
    magnitude, *rest = draw(7, 12, 2, torch.float32)
    for trained in (True, False):
        magnitude.requires_grad_(trained)
        assert torch.equal(compiled(magnitude, *rest), dora_factor(magnitude, *rest, SCALE))
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(chosen, dtype):
    given = draw(7, 12, 2, dtype)
    torch.library.opcheck(torch.ops.fastlora.dora_factor.default, (*given, SCALE))
    factor, norm = torch.ops.fastlora.dora_factor(*given, SCALE)
    torch.library.opcheck(torch.ops.fastlora.dora_factor_backward.default, (factor, given[0], norm))


def test_the_choice(monkeypatch):
    """Native code where the weight's rows lie together, in what it computes in."""
    weight = torch.ones(5, 4)
    if ops.has("dora_factor", "cpu"):
        assert operator.choose(weight).implementation == "cpu"
    for other in (weight.T, weight.double(), weight.to("meta")):
        assert operator.choose(other).implementation == "blocks"
    monkeypatch.setattr(ops, "forced", "reference")
    assert operator.choose(weight) == ops.Choice("reference", "FASTLORA_IMPL")


def test_as_many_threads_as_there_are_give_the_same_bits(chosen):
    given, threads, found = draw(333, 70, 5, torch.float32), torch.get_num_threads(), []
    for number in (1, 2):
        torch.set_num_threads(number)
        found.append(dora_factor(*given, SCALE))
    torch.set_num_threads(threads)
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("weight", (torch.ones(4), torch.ones(2, 4), torch.ones(5, 2))),
        ("weight", (torch.ones(5, 4).double(), torch.ones(2, 4), torch.ones(5, 2))),
        ("lora_a", (torch.ones(5, 4), torch.ones(2, 3), torch.ones(5, 2))),
        ("lora_a", (torch.ones(5, 4), torch.ones(2, 4).half(), torch.ones(5, 2))),
        ("lora_b", (torch.ones(5, 4), torch.ones(2, 4), torch.ones(5, 3))),
        ("lora_b", (torch.ones(5, 4), torch.ones(2, 4), torch.ones(4, 2))),
    ],
)
def test_native_code_checks_as_well(name, arguments):
    if ops.native("dora_norm_cpu") is None:
        pytest.skip("the extension is not built")
    with pytest.raises(RuntimeError, match=name):
        ops.native("dora_norm_cpu")(*arguments, SCALE)


def test_the_reference_is_the_paper():
    magnitude, weight, lora_a, lora_b = draw(5, 6, 2, torch.float64)
    factor, norm = reference.dora_factor(magnitude, weight, lora_a, lora_b, SCALE)
    assert torch.allclose(norm, (weight + SCALE * lora_b @ lora_a).square().sum(1).sqrt())
    assert torch.allclose(factor * norm, magnitude)


RIGHT = {
    "magnitude": torch.ones(5),
    "weight": torch.ones(5, 4),
    "lora_a": torch.ones(2, 4),
    "lora_b": torch.ones(5, 2),
    "scale": 1.0,
}


@pytest.mark.parametrize(
    ("name", "error", "value"),
    [
        ("magnitude", TypeError, [1.0]),
        ("magnitude", ValueError, torch.ones(4)),
        ("magnitude", ValueError, torch.ones(5).half()),
        ("magnitude", ValueError, torch.ones(5, device="meta")),
        ("weight", TypeError, None),
        ("weight", ValueError, torch.ones(5)),
        ("weight", ValueError, torch.ones(5, 4, requires_grad=True)),
        ("lora_a", TypeError, None),
        ("lora_a", ValueError, torch.ones(2, 5)),
        ("lora_a", ValueError, torch.tensor(1.0)),
        ("lora_b", TypeError, None),
        ("lora_b", ValueError, torch.ones(5, 3)),
        ("lora_b", ValueError, torch.ones(5, 2).double()),
        ("scale", TypeError, "1"),
        ("scale", ValueError, float("nan")),
    ],
)
def test_a_wrong_argument_is_named(name, error, value):
    with pytest.raises(error, match=rf"^{name}: "):
        dora_factor(**{**RIGHT, name: value})
