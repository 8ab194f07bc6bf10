"""csrc/cpu/adapter_tiles.cpp: the adapter's bfloat16 products in tiles, on a CPU that has them, or emulated (csrc/cpu/tiles.h).

The equations are tested with emulated tiles by `make imitate` too, on all inputs of test_<operator>.py; here on those that tiles make special.
"""

import functools
from functools import partial
from itertools import product

import pytest
import test_lora_linear_shared
import test_multi_lora
import torch
from bounds import INPUTS, assert_within_bound_over_inputs, gapped, make_layer, run_apart, transposed
from test_native import ISAS, NEEDED, assert_near_reference_over_inputs, name_instruction_set, run, update
from torch import Tensor

from fastlora import ops, reference

# A tile is of 16 rows, ranks or columns, or of 32; a strip of 128 or 256 columns; a part of 32 or 128 rows and of 2,048 columns.
SHAPES = (  # M, K, N, R
    (16, 1, 17, 8),
    (17, 33, 64, 9),
    (32, 65, 31, 16),
    (33, 257, 130, 17),
    (128, 129, 257, 32),
    (129, 2100, 66, 33),
    (300, 70, 2049, 65),
    (47, 96, 40, 512),
)
UNTILED = ((15, 65, 48, 16), (40, 65, 48, 7), (40, 65, 48, 513))

pytestmark = pytest.mark.skipif(
    not ops.availability()[1].present,
    reason="the native extension is not built (make demo, or pip install -e . with g++)",
)


@functools.cache
def widest() -> str:
    return run_apart("test_native", name_instruction_set).strip()


@pytest.fixture(autouse=True, params=["amx_emulated", "amx"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated ones, and the machine's own, in processes that are started."""
    monkeypatch.delenv("FASTLORA_ISA", raising=False)
    needed = NEEDED.get(request.param, request.param)  # emulated tiles stand beside its kernels
    if ISAS.index(widest()) < ISAS.index(needed):
        pytest.skip(f"this machine has no {needed}")
    monkeypatch.setenv("FASTLORA_ISA", request.param)


def check_bounds() -> None:
    torch.manual_seed(0)
    seed = torch.tensor([20_000_000_000])
    for threads, shape, adapter, p in product((1, 3), SHAPES + UNTILED, (torch.float32, torch.bfloat16), (0.0, 0.1)):
        torch.set_num_threads(threads)
        draw = partial(make_layer, *shape, torch.bfloat16, adapter)
        assert_near_reference_over_inputs(draw, p, seed, INPUTS if shape[1] == 1 else 1)
        layer = draw()
        for once, again in zip(*(run(layer, 1.5, p, seed) for _ in range(2)), strict=True):
            assert torch.equal(once, again)


def test_bounds() -> None:
    run_apart("test_tiles", check_bounds)


def check_mixed_rows() -> None:
    """Adapters in tiles beside some that have too few rows or ranks for them, rows without one, and layers of either kind that share x."""
    torch.manual_seed(0)
    index = [(0, 1, 1, 2, -1, 3, 1)[i % 7] if i % 11 else 4 for i in range(180)]  # adapter 4 has 17 rows, 5 has none
    ranks = [16, 40, 4, 8, 33, 16]
    for dtype in (torch.float32, torch.bfloat16):
        sizes = {"K": 300, "N": 70, "dtype": torch.bfloat16, "adapter_dtype": dtype}
        test_multi_lora.check(partial(test_multi_lora.make_mixed, index, ranks, **sizes))
        case = test_lora_linear_shared.Shared(
            70, 129, ((64, 16), (31, 5), (257, 40)), torch.bfloat16, dtype, [0.0, 0.5, 0.1]
        )
        assert_within_bound_over_inputs(partial(test_lora_linear_shared.compare_shared, case, "cpu"))


def test_mixed_rows() -> None:
    run_apart("test_tiles", check_mixed_rows)


def check_layouts() -> None:
    torch.manual_seed(0)
    layer = make_layer(45, 70, 50, 18, torch.bfloat16)
    seed = torch.tensor([11])
    loose = layer._replace(
        x=gapped(layer.x), dy=transposed(layer.dy), lora_a=transposed(layer.lora_a), lora_b=gapped(layer.lora_b)
    )
    for one, other in zip(run(layer, 1.5, 0.1, seed)[1::2], run(loose, 1.5, 0.1, seed)[1::2], strict=True):  # xa and da
        assert torch.equal(one, other)


def test_gaps_change_no_bit() -> None:
    run_apart("test_tiles", check_layouts)


def check_infinities() -> None:
    """What is not finite stays in its row, and what is dropped is zero: no tile multiplies it by the zeros that it is padded with."""
    M, K, R = 50, 70, 17
    a, b = torch.ones(R, K, dtype=torch.bfloat16), torch.ones(40, R, dtype=torch.bfloat16)
    x = torch.ones(M, K, dtype=torch.bfloat16)
    x[3, 69], x[20] = torch.nan, torch.inf
    y = torch.zeros(M, 40, dtype=torch.bfloat16)
    xa, _ = update([y], x, [a], [b], [1.0], [0.0], None)
    finite = torch.ones(M, dtype=torch.bool)
    finite[[3, 20]] = False
    assert xa[0, 3].isnan().all() and xa[0, 20].isposinf().all() and y[3].isnan().all() and y[20].isposinf().all()
    assert (xa[0, finite] == K).all() and (y[finite] == torch.tensor(K * R).bfloat16()).all()
    seed = torch.tensor([4])
    keep = reference.keep_mask(seed, torch.arange(M), K, 0.5)
    x = torch.where(keep, 1.0, torch.inf).bfloat16()
    xa, bits = update([y.zero_()], x, [a], [b], [1.0], [0.5], seed)
    expected = 2 * keep.sum(1, dtype=torch.float32)
    assert torch.equal(xa[0], expected[:, None].expand(M, R)) and y.isfinite().all()
    dx, dy = torch.zeros_like(x), torch.ones_like(y)
    da, _ = torch.ops.fastlora.lora_update_backward_cpu(
        dx, [dy], x, [a], [b], xa, bits, [1.0], [0.5], None, None, True, True
    )
    assert torch.equal(dx, (keep * torch.tensor(2.0 * 40 * R)).bfloat16()), "dx"
    assert torch.equal(da.view(R, K).float(), (80 * keep.sum(0)).expand(R, K).bfloat16().float()), "da"


def test_what_is_not_finite() -> None:
    run_apart("test_tiles", check_infinities)


def flushed(value: Tensor) -> Tensor:
    return torch.where(value.abs() < torch.finfo(value.dtype).tiny, torch.zeros_like(value), value)


def check_rounding() -> None:
    """xa [M, R] to the bit as TDPBF16PS sums 32 columns: even ones apart from odd ones, then both, then onto what was there."""
    torch.manual_seed(0)
    M, K, R = 16, 96, 16
    for scale in (1.0, 2.0**-60, 2.0**-63, 2.0**-70):  # down to products, and then numbers, that are subnormal
        x, a = ((torch.randn(n, K) * 2.0 ** torch.randint(-9, 9, (n, K)) * scale).bfloat16() for n in (M, R))
        xa, _ = update(
            [torch.zeros(M, 8, dtype=torch.bfloat16)], x, [a], [torch.ones(8, R).bfloat16()], [1.0], [0.0], None
        )
        total = torch.zeros(M, R)
        wide = flushed(x).double(), flushed(a).double()
        for begin in range(0, K, 32):
            halves = []
            for first in (begin, begin + 1):
                half = torch.zeros(M, R)
                for k in range(first, begin + 32, 2):  # fused: float64 holds the product, and the sum near enough
                    half = flushed((half.double() + wide[0][:, k, None] * wide[1][None, :, k]).float())
                halves.append(half)
            total = flushed(total + flushed(halves[0] + halves[1]))
        assert torch.equal(xa[0], total), f"scale {scale}"


def test_rounding_is_the_instruction_s() -> None:
    """Which also says that tiles ran: vectors sum in another order."""
    run_apart("test_tiles", check_rounding)


def test_tiles_that_are_not_there_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cpu._is_amx_tile_supported():
        pytest.skip("this machine has tiles")
    monkeypatch.setenv("FASTLORA_ISA", "amx")
    with pytest.raises(AssertionError, match="FASTLORA_ISA=amx: this machine does not have it"):
        run_apart("test_native", name_instruction_set)
