"""csrc's few_rows_now_cpu, which computes as few_rows_lora_cpu does, and mixed batches in which each adapter has a few rows."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantised_weights import weight as quantised_weight
from torch import Tensor

from fastlora import ops
from fastlora.bounds import Errors
from fastlora.choice import table
from fastlora.operators import lora_linear

now, with_xa, update = (ops.native(f"{name}_cpu") for name in ("few_rows_now", "few_rows_lora", "lora_update"))
pytestmark = pytest.mark.skipif(now is None, reason="needs the native extension")
K, N, R = 37, 29, 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def arguments(rows: int, dtype: torch.dtype, adapter_dtype: torch.dtype, bias: bool = True) -> list[Any]:
    draw = torch.Generator().manual_seed(rows)
    x, w, c, a, b = (torch.randn(size, generator=draw) for size in ((rows, K), (N, K), (N,), (R, K), (N, R)))
    return [x.to(dtype), w.to(dtype), c.to(dtype) if bias else None, a.to(adapter_dtype), b.to(adapter_dtype), 0.5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", range(1, 9))
def test_the_same_as_with_xa(rows: int, dtype: torch.dtype) -> None:
    for adapter_dtype in {dtype, torch.float32}:
        for bias in (True, False):
            x, *rest = arguments(rows, dtype, adapter_dtype, bias)
            expected = with_xa(x, *rest)[0]
            assert torch.equal(now(x, *rest), expected)
            assert torch.equal(now(x.view(1, rows, K), *rest), expected.view(1, rows, N))
            apart = torch.stack((x, x), 1)[:, 0]
            assert torch.equal(now(apart, *rest), expected)
            assert torch.equal(lora_linear.compute_few(x[0], *rest), with_xa(x[:1], *rest)[0][0])


def test_each_wrong_argument_is_named() -> None:
    right = arguments(3, torch.float32, torch.float32)
    for place, name, value in (
        (0, "x", torch.ones(9, K)),
        (0, "x", torch.ones(3, K).double()),
        (0, "x", torch.ones(0, K)),
        (1, "weight", torch.ones(N, K + 1)),
        (1, "weight", torch.ones(K, N).t()),
        (2, "bias", torch.ones(N + 1)),
        (3, "lora_a", torch.ones(R, K + 1)),
        (3, "lora_a", torch.ones(0, K)),
        (4, "lora_b", torch.ones(N, R + 1)),
        (4, "lora_b", torch.ones(N, R).bfloat16()),
    ):
        with pytest.raises(RuntimeError, match=f"{name}: "):
            now(*right[:place], value, *right[place + 1 :])


def test_what_is_not_for_it() -> None:
    right = arguments(3, torch.float32, torch.float32)
    for x in (torch.ones(9, K), torch.ones(0, K), torch.ones(3, K, device="meta")):
        assert lora_linear.compute_few(x, *right[1:]) is None
    assert lora_linear.compute_few(right[0], right[1].t().contiguous().t(), *right[2:]) is None
    double = [one.double() if isinstance(one, Tensor) else one for one in right]
    assert lora_linear.compute_few(*double) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layers", [1, 2])
def test_few_rows_of_each_adapter(layers: int, dtype: torch.dtype) -> None:
    """32 rows of seven adapters of several ranks, one of which has none, and rows without an adapter."""
    draw = torch.Generator().manual_seed(layers)
    rows, ranks = 32, (1, 5, 16, 17, 3, 2, 4)
    for adapter_dtype in {dtype, torch.float32}:
        x = torch.randn(rows, K, generator=draw).to(dtype)
        index = torch.arange(rows) % 8 - 1
        index[index == 4] = -1
        order, offsets = lora_linear.group_rows(index, len(ranks)).for_rows(rows)
        a = [torch.randn(r, K, generator=draw).to(adapter_dtype) for _ in range(layers) for r in ranks]
        b = [torch.randn(N, r, generator=draw).to(adapter_dtype) for _ in range(layers) for r in ranks]
        base = [torch.randn(rows, N, generator=draw).to(dtype) for _ in range(layers)]
        scales, p = [0.5 + i for i in range(len(a))], [0.0] * len(a)
        ys = [y.clone() for y in base]
        xa, keep = update(ys, x, a, b, scales, p, None, order, offsets)
        assert not keep.numel() and xa.shape == (layers, rows, 17)
        for g, y in enumerate(ys):
            own = slice(g * len(ranks), (g + 1) * len(ranks))
            exact, eager = base[g].double(), base[g].clone()
            for i, (one_a, one_b, s) in enumerate(zip(a[own], b[own], scales[own], strict=True)):
                mine = index == i
                projected = x[mine].double() @ one_a.double().t()
                exact[mine] += s * projected @ one_b.double().t()
                eager[mine] += (s * (x[mine].to(adapter_dtype) @ one_a.t()) @ one_b.t()).to(dtype)
                torch.testing.assert_close(xa[g, mine, : len(one_a)].double(), projected, rtol=1e-2, atol=1e-2)
            assert torch.equal(y[index == -1], base[g][index == -1])
            tiny = torch.finfo(dtype).eps * exact.abs().max().item()
            errors = Errors((y.double() - exact).abs().max().item(), (eager.double() - exact).abs().max().item(), tiny)
            assert errors.within, errors


@pytest.mark.parametrize("why", ["no columns", "quantised", "not built", "traced", "a choice", "float64", "by column"])
def test_where_one_call_is_not_enough(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, *rest = arguments(3, torch.float32, torch.float32)
    chosen: list[str] = []
    monkeypatch.setattr(table, "choices", {})
    monkeypatch.setattr(lora_linear, "_few_rows_now", lambda *_: "computed")
    implementation = "reference" if why == "a choice" else "cpu"
    monkeypatch.setattr(
        lora_linear, "choose", lambda *_: chosen.append(why) or SimpleNamespace(implementation=implementation)
    )
    assert (lora_linear.compute_few(x, w, *rest) is None) == (why == "a choice") and len(chosen) == 1
    assert (lora_linear.compute_few(x, w, *rest) is None) == (why == "a choice") and len(chosen) == 1  # remembered
    if why == "no columns":
        x, w = torch.ones(3, 0), torch.ones(N, 0)
    elif why == "quantised":
        w = quantised_weight("int8", N, K, torch.float32)
    elif why == "not built":
        monkeypatch.setattr(lora_linear, "_few_rows_now", None)
    elif why == "traced":
        monkeypatch.setattr(lora_linear, "is_eager", lambda *_: False)
    elif why == "float64":
        x, w = x.double(), w.double()
    elif why == "by column":
        w = w.t().contiguous().t()
    assert lora_linear.compute_few(x, w, *rest) is None and len(chosen) == 1
