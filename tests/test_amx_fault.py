"""amx_fault.py: the imitated fault is the one that was seen, in every product of torch, and nothing else changes."""

from collections.abc import Callable

import amx_fault
import pytest
import torch
import torch.nn.functional as F
from bounds import run_apart
from torch import Tensor

from fastlora import reference

BF16 = torch.bfloat16


def rows_in_nan(rows: int, columns: int, distance: int, dtype: torch.dtype = BF16, offset: int = 0) -> Tensor:
    """Numbers between NaN, each row that far from the one before."""
    around = torch.full((rows * distance,), torch.nan, dtype=dtype)
    return around[offset:].as_strided((rows, columns), (distance, 1)).copy_(torch.randn(rows, columns))


LEFT = [
    (rows_in_nan(64, 37, 40), 64),
    (rows_in_nan(37, 100, 103), 37),
    (rows_in_nan(20, 70, 73), 20),
    (rows_in_nan(64, 37, 40, torch.float16), 64),
    (rows_in_nan(64, 37, 40)[:8], 8),
    (rows_in_nan(8, 37, 40, offset=3), 7),  # behind the last one the memory ends
    (rows_in_nan(64, 36, 40), 0),
    (rows_in_nan(64, 37, 40, torch.float32), 0),
    (rows_in_nan(5, 37, 40), 0),
    (rows_in_nan(64, 37, 37), 0),
    (rows_in_nan(64, 37, 40).clone(), 0),
    (torch.ones(64, 40, dtype=BF16)[:, :37], 0),  # what is read is finite
    (torch.full((37, 64), torch.nan, dtype=BF16).t(), 0),
    (torch.empty(0, 37, dtype=BF16), 0),
]


@pytest.mark.parametrize(("left", "spoiled"), LEFT)
def test_what_is_read_past_the_last_column(left: Tensor, spoiled: int) -> None:
    found = amx_fault.spoiled_rows(left)
    assert (0 if found is None else int(found.sum())) == spoiled
    in_batch = amx_fault.spoiled_rows(left[None])
    assert (0 if in_batch is None else int(in_batch.sum())) == spoiled


@pytest.mark.parametrize("left", [left for left, _ in LEFT])
def test_readable_rows_have_nothing_behind_them(left: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_has_amx", True)
    for operand in (left, left.t()):
        readable = reference.readable_rows(operand)
        assert torch.equal(readable.nan_to_num(), operand.nan_to_num())
        for given in (readable, readable.t()):
            found = amx_fault.spoiled_rows(given)
            assert found is None or not found.any()


def products() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """x [M, K] times the transpose of w [N, K], by each of torch's operators."""

    def into(x: Tensor, w: Tensor) -> Tensor:
        return x.new_empty(len(x), len(w))

    return {
        "linear": F.linear,
        "linear, bias": lambda x, w: F.linear(x, w, into(x[:1], w)[0].zero_()),
        "mm": lambda x, w: x @ w.t(),
        "mm.out": lambda x, w: torch.mm(x, w.t(), out=into(x, w)),
        "addmm_": lambda x, w: into(x, w).zero_().addmm_(x, w.t()),
        "addmm.out": lambda x, w: torch.addmm(into(x, w).zero_(), x, w.t(), out=into(x, w)),
        "bmm": lambda x, w: torch.bmm(x[None], w.t()[None])[0],
        "bmm.out": lambda x, w: torch.bmm(x[None], w.t()[None], out=into(x, w)[None])[0],
        "baddbmm": lambda x, w: torch.baddbmm(into(x, w)[None].zero_(), x[None], w.t()[None])[0],
        "einsum": lambda x, w: torch.einsum("mk,nk->mn", x, w),
        "a module": lambda x, w: torch.nn.Linear(w.shape[1], len(w), bias=False, dtype=x.dtype).requires_grad_(False)(x),
    } | (of_onednn() if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {})  # fmt: skip


def of_onednn() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Its own products, which there are of bfloat16 on a CPU with AVX-512 only."""
    return {
        "oneDNN": lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),
        "oneDNN, packed": lambda x, w: torch.ops.mkldnn._linear_pointwise(
            x, torch.ops.mkldnn._reorder_linear_weight(w), None, "none", [], ""
        ),
    }


def check_products() -> None:
    x, w = rows_in_nan(64, 37, 40), torch.randn(24, 37).to(BF16)
    before = {name: product(x.clone(), w) for name, product in products().items()}
    amx_fault.install()
    amx_fault.install()
    for name, product in products().items():
        if name.startswith("oneDNN") and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            continue
        assert product(x, w).isnan().all(), name
        assert name == "a module" or torch.equal(product(x.clone(), w), before[name]), name
        assert product(x.float(), w.float()).isfinite().all(), name
    leaf = x.detach().requires_grad_()
    (dx,) = torch.autograd.grad(F.linear(leaf, w), leaf, rows_in_nan(64, 24, 27))
    assert dx.isnan().all(), "called by autograd, in C++"


def test_every_product_of_torch_has_the_fault() -> None:
    run_apart("test_amx_fault", check_products)
