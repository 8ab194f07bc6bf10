"""What is special to the Triton implementations: their tiles, their mask, their split sums, their groups; and the interpreter they are tested in."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from bounds import assert_within_bound, dense, double, gapped, make_layer, transposed
from lora_arguments import Arguments, detached, one_layer
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed: there are no kernels")

import triton
import triton.language as tl

from fastlora import ops, reference
from fastlora.choice import measure, problems, table
from fastlora.functional import RowGroups
from fastlora.kernels import lora_linear, prefix_concat, tuning
from fastlora.kernels.philox import draw_keep_mask, drop_threshold, keep_scale, load_keep_mask
from fastlora.kernels.tiles import partials_for, sum_partials, tile_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(
    DEVICE == "cuda", reason="with a GPU the kernels are compiled, and the interpreter is not used"
)
OUTPUTS = ("y", "xa", "dx", "da", "db")


def go(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Run the operators that way. Where it takes a library's product, cuBLAS stands there on a card, which reads no gap: torch's on a CPU may."""
    monkeypatch.setattr(table, "forced_way", way)
    linear, mm, addmm_ = F.linear, torch.mm, Tensor.addmm_
    monkeypatch.setattr(F, "linear", lambda x, *rest: linear(dense(x), *rest))
    monkeypatch.setattr(torch, "mm", lambda x, *rest, **options: mm(dense(x), *rest, **options))
    monkeypatch.setattr(Tensor, "addmm_", lambda to, x, *rest, **options: addmm_(to, dense(x), *rest, **options))


def run_lora(implementation: str, layer, scale: float, dropout_p: float, seed: Tensor | None) -> list[Tensor]:
    """y, xa, dx, dA and dB of an implementation."""
    return one_layer(layer, scale, dropout_p, seed).both(implementation, [layer.dy.detach()])


def assert_right(layer, scale: float, dropout_p: float, seed: Tensor | None) -> list[Tensor]:
    """Triton's results, within their bounds."""
    # float32 adapters of a 16-bit x are rounded to it first, as the equations say.
    rounded = layer._replace(lora_a=layer.lora_a.to(layer.x.dtype), lora_b=layer.lora_b.to(layer.x.dtype))
    values = run_lora("triton", layer, scale, dropout_p, seed)
    eager = run_lora("reference", type(layer)(*map(dense, layer)), scale, dropout_p, seed)
    exact = run_lora("reference", type(layer)(*map(double, rounded)), scale, dropout_p, seed)
    for name, *results in zip(OUTPUTS, values, eager, exact, strict=True):
        assert_within_bound(name, *results)
    return values


def use_small_tiles(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Tiles of 16 by 16 by 16, so that small inputs have many, in every direction; `rank` ranks at a time."""
    for name in ("linear", "adding", "shrink", "shrink_back", "adapter_grad"):
        config = tuning.Config(16, 16, 16, rank, num_warps=4, num_stages=2)
        monkeypatch.setattr(tuning, name, lambda *args, config=config: config)


@pytest.mark.parametrize(("rank", "parts", "dropout_p", "few_rows", "way"), [
    (16, 1, 0.3, 0, "fused"), (32, 3, 0.0, 0, "fused"), (32, 3, 0.3, 64, "fused"), (16, 2, 0.3, 0, "library"),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lora_linear_in_many_tiles(monkeypatch, dtype, rank, parts, dropout_p, few_rows, way):
    use_small_tiles(monkeypatch, rank)
    go(monkeypatch, way)
    monkeypatch.setattr(tuning, "PARTIAL_SUM_ROWS", few_rows)
    monkeypatch.setattr(tuning, "parts", lambda x, programs, steps: parts)
    monkeypatch.setattr(tuning, "GROUP_M", 2)
    layer = make_layer(20, 35, 20, 18, dtype, torch.float32, device=DEVICE)
    layer = layer._replace(
        x=gapped(layer.x), weight=transposed(layer.weight), dy=gapped(layer.dy), lora_b=gapped(layer.lora_b)
    )
    seed = torch.tensor([2**62 + 12345], device=DEVICE)
    first = assert_right(layer, 1.7, dropout_p, seed)
    second = run_lora("triton", layer, 1.7, dropout_p, seed)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def shared_arguments(layers, dropout_p: list[float], seed: Tensor) -> Arguments:
    """Layers that share the first one's x."""
    columns = ([getattr(layer, name) for layer in layers] for name in ("weight", "bias", "lora_a", "lora_b"))
    return Arguments(layers[0].x, *columns, [1.0 + i for i in range(len(layers))], dropout_p, seed).mapped(detached)


def assert_arguments_right(arguments: Arguments, dy: list[Tensor], rows: Tensor | None = None) -> list[Tensor]:
    """Triton's results of the whole operator, within their bounds. rows: of y and dx only these; what each is called goes with its place."""
    values = arguments.both("triton", dy)
    eager = arguments.mapped(dense).both("reference", [dense(one) for one in dy])
    exact = arguments.mapped(double).both("reference", [double(one) for one in dy])
    for place, (value, near, truth) in enumerate(zip(values, eager, exact, strict=True)):
        of_rows = rows is not None and place in (*range(len(dy)), len(dy) + 1)
        picked = (one[rows] if of_rows else one for one in (value, near, truth))
        assert_within_bound(f"result {place}", *picked)
    return values


@pytest.mark.parametrize(("way", "dtype"), [("fused", torch.float32), ("library", torch.bfloat16)], ids=str)
def test_layers_that_share_x_in_many_tiles(monkeypatch, way, dtype):
    """Ranks that span tiles, other widths, a layer without a bias, and one that drops nothing beside two that drop."""
    use_small_tiles(monkeypatch, 16)
    go(monkeypatch, way)
    monkeypatch.setattr(tuning, "parts", lambda x, programs, steps: 2)
    layers = [make_layer(20, 35, N, R, dtype, bias=N != 9, device=DEVICE) for N, R in ((24, 18), (9, 1), (20, 5))]
    layers = [type(layer)(*(None if one is None else one.detach() for one in layer)) for layer in layers]
    layers[1] = layers[1]._replace(weight=transposed(layers[1].weight), lora_a=gapped(layers[1].lora_a))
    arguments = shared_arguments(layers, [0.3, 0.0, 0.5], torch.tensor([5, 2**40, 2**62 + 1], device=DEVICE))
    assert_arguments_right(arguments, [layer.dy for layer in layers])


@pytest.mark.parametrize("needed", list(itertools.product([False, True], repeat=3)), ids=str)
def test_lora_linear_backward_gives_what_is_needed_and_no_more(needed):
    layer = make_layer(5, 20, 12, 3, device=DEVICE)
    arguments = one_layer(layer, 0.5, 0.2)
    xa, keep = torch.randn(1, 5, 3, device=DEVICE), torch.randint(256, (1, 5, 8), dtype=torch.uint8, device=DEVICE)
    everything = lora_linear.lora_linear_backward(*arguments.backward_arguments([layer.dy], xa, keep))
    some = lora_linear.lora_linear_backward(*arguments.backward_arguments([layer.dy], xa, keep, *needed))
    for value, full, wanted in zip(some, everything, needed, strict=True):
        assert torch.equal(value, full) if wanted else value.numel() == 0


def test_dy_may_be_expanded():
    layer = make_layer(9, 20, 12, 3, device=DEVICE)
    assert_right(layer._replace(dy=torch.tensor(0.7, device=DEVICE).expand(9, 12)), 1.0, 0.0, None)


def test_rows_of_zeros_and_nan_stay_in_their_rows():
    layer = make_layer(20, 33, 17, 4, device=DEVICE)
    x = layer.x.detach().clone()
    x[3] = torch.nan
    y, xa, dx, *_ = run_lora("triton", layer._replace(x=x), 1.0, 0.0, None)
    assert y[3].isnan().all() and xa[0, 3].isnan().all() and dx.isfinite().all()
    assert y[torch.arange(20) != 3].isfinite().all()


@triton.jit
def keep_mask_kernel(
    out_ptr, keep_ptr, seed_ptr, rows_ptr, columns, threshold, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    i, first = tl.arange(0, ROWS), tl.program_id(0) * BLOCK
    rows, column, inside = tl.load(rows_ptr + i), first + tl.arange(0, BLOCK), i < ROWS
    keep = draw_keep_mask(seed_ptr, None, rows, inside, first, columns, threshold, BLOCK)
    if keep_ptr is not None:  # rows 0, 1, 2, ...: stored, and read back
        draw_keep_mask(seed_ptr, keep_ptr, rows, inside, first, columns, threshold, BLOCK)
        tl.debug_barrier()
        keep = load_keep_mask(keep_ptr, rows, inside, first, columns, BLOCK)
    tl.store(out_ptr + i[:, None] * columns + column[None, :], keep.to(tl.uint8), mask=(column < columns)[None, :])


@pytest.mark.parametrize("dropout_p", [1e-6, 0.1, 0.5, 0.99999, 1.0])
def test_the_mask_has_the_references_bits(dropout_p):
    K = 61
    far = torch.tensor([0, 1, 2, 7, 2**29, 2**31 - 1, 2**31, 2**40 + 3], device=DEVICE)  # row * 8 passes 32 bits
    near = torch.arange(8, device=DEVICE)
    for seed in (torch.tensor(value, device=DEVICE) for value in (0, 1, 2**32 - 1, 2**32, 2**63 - 1)):
        stored = torch.zeros(8, 8, dtype=torch.uint8, device=DEVICE)
        for rows, keep in ((far, None), (near, stored)):
            expected = reference.keep_mask(seed, rows, K, dropout_p)
            out = torch.zeros(8, K, dtype=torch.uint8, device=DEVICE)
            keep_mask_kernel[(2,)](out, keep, seed, rows, K, drop_threshold(dropout_p), ROWS=8, BLOCK=32)
            assert torch.equal(out.bool(), expected)
        drawn = (stored[:, :, None] >> torch.arange(8, device=DEVICE)) & 1
        assert torch.equal(drawn.reshape(8, -1)[:, :K].bool(), expected)


def test_the_mask_has_the_references_probabilities():
    for p in (0.0, 1e-9, 1 / 131072, 0.05, 0.1, 1 / 3, 0.5, 0.999999, 1.0):
        assert (drop_threshold(p), keep_scale(p)) == (reference.drop_threshold(p), reference.keep_scale(p))


@triton.jit
def tile_kernel(out_ptr, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    m, n = tile_of(tl.program_id(0), tiles_m, tiles_n, GROUP_M)
    tl.store(out_ptr + m * tiles_n + n, 1)


@pytest.mark.parametrize("tiles", [(1, 1), (7, 3), (8, 5), (17, 2), (3, 9)], ids=str)
def test_every_tile_is_computed(tiles):
    out = torch.zeros(tiles, dtype=torch.int32, device=DEVICE)
    tile_kernel[(tiles[0] * tiles[1],)](out, *tiles, GROUP_M=8)
    assert bool((out == 1).all())


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_partial_sums_are_added_in_order(parts):
    out = torch.empty(3, 700, device=DEVICE, dtype=torch.bfloat16)
    partials = partials_for(out, parts)
    assert partials.data_ptr() == out.data_ptr() if parts == 1 else partials.dtype == torch.float32
    partials.normal_()
    expected = torch.zeros(3, 700, device=DEVICE)
    for partial in partials:
        expected = expected + partial
    sum_partials(partials, out)
    assert torch.equal(out, expected.to(out.dtype))


def test_every_tile_is_one_that_a_tensor_core_takes():
    for dtype, rows, columns, rank in itertools.product(
        ops.KERNEL_DTYPES, (1, 33, 64, 8192), (1, 48, 4096), (1, 3, 65, 512)
    ):
        x = torch.empty(0, dtype=dtype)
        configs = [tuning.linear(x, rows, columns, rank), tuning.adding(x, rows, columns, rank)]
        configs += [tuning.shrink(x, x, rows, rank)]
        configs += [tuning.shrink_back(x, rows, columns, rank), tuning.adapter_grad(x, rows, columns, rank)]
        for config in configs:
            sizes = [
                size for size in dataclasses.astuple(config)[:4] if size != 0
            ]  # 0: the kernel has no such dimension
            assert all(size >= 16 and size & (size - 1) == 0 for size in sizes), config


@pytest.mark.parametrize("op", ["lora_linear", "lora_linear_shared", "multi_lora", "multi_lora_shared"])
def test_float64_is_refused(op):
    x = torch.zeros(2, 3, dtype=torch.float64, device=DEVICE)
    layers = [x] * (2 if op.endswith("shared") else 1)
    with pytest.raises(ops.ImplementationError, match=f"^{op}: .*float64"):
        ops.implementation(op, "triton")(x, layers, [None] * len(layers), layers, layers, *[None] * 5)
    with pytest.raises(ops.ImplementationError, match=f"^{op}_backward: .*float64"):
        ops.implementation(f"{op}_backward", "triton")(layers, x, layers, layers, layers, x, x, *[None] * 7)


def mixed_arguments(layers, adapters, dropout_p: list[float], seed: Tensor, groups: tuple[Tensor, Tensor]) -> Arguments:
    """layers give what is frozen, the first one x, and `adapters` every A and B, layer after layer."""
    frozen = [layer.weight for layer in layers], [layer.bias for layer in layers]
    own = [one.lora_a for one in adapters], [one.lora_b for one in adapters], [1.0 + i for i in range(len(adapters))]
    return Arguments(layers[0].x, *frozen, *own, dropout_p, seed, *groups).mapped(detached)


@pytest.mark.parametrize(("rank", "parts", "few_rows", "way"), [(16, 1, 0, "fused"), (32, 2, 64, "library")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_multi_lora_in_many_tiles(monkeypatch, dtype, rank, parts, few_rows, way):
    """Groups that end inside tiles, span tiles, or are empty; ranks that span tiles; rows of the base; numbers that do not exist."""
    use_small_tiles(monkeypatch, rank)
    go(monkeypatch, way)
    monkeypatch.setattr(tuning, "PARTIAL_SUM_ROWS", few_rows)
    monkeypatch.setattr(tuning, "parts", lambda x, programs, steps: parts)
    ranks = [3, 17, 1, 20, 16]
    index = torch.tensor(
        [0, 1, 1, -1, 4, 9] + [1] * 17 + [-1] * 3 + [4, 0, -7, 0, 4], device=DEVICE
    )  # nobody has adapters 2 and 3
    groups = RowGroups(index, len(ranks)).for_rows(len(index))
    layers = [make_layer(len(index), 37, 41, R, dtype, device=DEVICE) for R in ranks]
    dropout_p, seed = [0.1, 0.0, 0.5, 0.3, 1.0], torch.tensor([2**60 + 1], device=DEVICE)
    arguments = mixed_arguments(layers[:1], layers, dropout_p, seed, groups)
    wrong = (index < -1) | (index >= len(ranks))
    y, _, dx, *_ = assert_arguments_right(arguments, [layers[0].dy], rows=~wrong)
    assert y[wrong].isnan().all() and dx[wrong].isnan().all()


@pytest.mark.parametrize(("way", "few_rows", "dtype"), [
    ("fused", 64, torch.float32), ("fused", 0, torch.bfloat16), ("library", 0, torch.bfloat16),
], ids=str)  # fmt: skip
def test_multi_lora_of_layers_that_share_x_in_many_tiles(monkeypatch, way, few_rows, dtype):
    """Other widths and ranks in each layer, one of which drops nothing; a weight and an adapter that lie otherwise."""
    use_small_tiles(monkeypatch, 16)
    go(monkeypatch, way)
    monkeypatch.setattr(tuning, "PARTIAL_SUM_ROWS", few_rows)
    monkeypatch.setattr(tuning, "parts", lambda x, programs, steps: 2)
    index = torch.tensor([0, 1, 1, -1, 1] + [2] * 17 + [-1, 0, 2], device=DEVICE)
    groups = RowGroups(index, 3).for_rows(len(index))
    widths, ranks = (24, 9), ((3, 18, 1), (5, 2, 20))
    made = [[make_layer(len(index), 35, N, R, dtype, bias=N != 9, device=DEVICE) for R in own]
            for N, own in zip(widths, ranks, strict=True)]  # fmt: skip
    layers, adapters = [own[0] for own in made], [one for own in made for one in own]
    layers[1] = layers[1]._replace(weight=transposed(layers[1].weight), dy=gapped(layers[1].dy))
    adapters[4] = adapters[4]._replace(lora_a=gapped(adapters[4].lora_a))
    drawn = [0.3, 0.0, 0.5, 0.0, 0.0, 0.0], torch.tensor([5, 2**62 + 1], device=DEVICE)
    assert_arguments_right(mixed_arguments(layers, adapters, *drawn, groups), [layer.dy for layer in layers])


def test_one_adapter_for_all_rows_is_lora_linear():
    layer = make_layer(21, 40, 24, 5, device=DEVICE)
    groups = RowGroups(torch.zeros(21, dtype=torch.int64, device=DEVICE), 1).for_rows(21)
    seed = torch.tensor([99], device=DEVICE)
    alone = run_lora("triton", layer, 1.0, 0.2, seed)
    mixed = mixed_arguments([layer], [layer], [0.2], seed, groups).both("triton", [layer.dy])
    for name, one, many in zip(OUTPUTS, alone, mixed, strict=True):
        torch.testing.assert_close(many, one, rtol=1e-5, atol=1e-5, msg=name)


def test_tuning_measures_both_ways_and_the_faster_one_is_taken(monkeypatch):
    """The product in Triton, or left to torch's library: each is checked, and the choice lasts through a checkpoint."""
    times = {"triton fused": 0.9, "triton library": 0.5}
    monkeypatch.setattr(ops, "candidates", lambda op, device, dtype: ["triton"])
    monkeypatch.setitem(problems.SHAPES, "small", (40, 24))
    monkeypatch.setattr(measure, "ratios", lambda functions, *_: {name: times[name] for name in list(functions)[1:]})
    problem = problems.Problem("lora_linear", torch.float32, 8, "small", False)
    found = measure.one_class(problem, torch.device(DEVICE), 0.0)
    assert [(one.op, one.ratio, one.way) for one in found] == [
        ("lora_linear", 0.5, "library"),
        ("lora_linear_backward", 0.5, "library"),
    ]
    x, weight = torch.empty(8, 40, device=DEVICE), torch.empty(24, 40, device=DEVICE)
    assert not tuning.by_library("lora_linear", x, weight, False)  # not known
    table.load_state({DEVICE: [list(one) for one in found]})
    assert tuning.by_library("lora_linear", x, weight, False) and table.forced_way == ""


@pytest.mark.parametrize("case", range(12))
def test_prefix_concat_in_many_blocks(monkeypatch, case):
    """Random batches with holes in their masks, in blocks of four columns: every copy equal, every sum equal."""
    monkeypatch.setattr(prefix_concat, "BLOCK_T", 4)
    monkeypatch.setattr(prefix_concat, "BLOCK_D", 4)
    torch.manual_seed(case)
    B, T, D, lengths = case % 5 + 1, (case * 7) % 13 + 1, case % 4 * 3 + 1, [case % 6, 3, 9][: case % 3 + 1]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    prompts = torch.randn(sum(lengths), D, dtype=torch.float32)
    index = (
        torch.randint(0, len(lengths), (B,)) if case else torch.tensor([-1])
    )  # the first case: a prompt that does not exist
    mask = torch.rand(B, T) > 0.4
    if B > 2:  # a row without tokens, a row without padding, and a row padded on the left, whose side they take
        mask[:3] = torch.tensor([0, 1, 1])[:, None]
        mask[2, 0] = False
    mask = mask.to((torch.bool, torch.int64, torch.float32)[case % 3])
    ids, embedding = torch.randint(0, 9, (B, T)), torch.randn(8 if case % 4 == 0 else 9, D).bfloat16()
    embeds, numbers = torch.randn(B, T, D).bfloat16(), torch.randint(0, 50, (B, T))
    tokens = (embeds, None, None) if case % 2 else (None, ids, embedding)
    extra = ((None, None), (numbers, None), (None, numbers), (numbers.T.contiguous().T, numbers))[case % 4]
    arguments = [prompts, starts, max(lengths), index, *tokens, mask, *extra]
    arguments = [value.to(DEVICE) if isinstance(value, Tensor) else value for value in arguments]
    values, expected = prefix_concat.prefix_concat(*arguments), reference.prefix_concat(*arguments)
    for name, value, right in zip(("embeds", "mask", "positions", "labels", "source"), values, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=0, atol=0, equal_nan=True, msg=name)

    dout = torch.randn(B, 1, D, device=DEVICE).expand(B, T + max(lengths), D).bfloat16()
    for needed in itertools.product([False, True], repeat=2):
        values = prefix_concat.prefix_concat_backward(dout, expected[4], sum(lengths), T, *needed)
        for value, right in zip(
            values, reference.prefix_concat_backward(dout, expected[4], sum(lengths), T, *needed), strict=True
        ):
            torch.testing.assert_close(value, right, rtol=0, atol=0)


@pytest.mark.parametrize(("B", "T", "P"), [(0, 3, 2), (2, 0, 2), (2, 3, 0), (2, 0, 0)])
def test_prefix_concat_of_nothing(B, T, P):
    starts, index = torch.tensor([0, P], device=DEVICE), torch.zeros(B, dtype=torch.int64, device=DEVICE)
    embeds, mask = torch.randn(B, T, 5, device=DEVICE), torch.ones(B, T, device=DEVICE)
    prompts = torch.randn(P, 5, device=DEVICE)
    out, *_, source = prefix_concat.prefix_concat(prompts, starts, P, index, embeds, None, None, mask, None, None)
    assert torch.equal(out, torch.cat((prompts.expand(B, P, 5), embeds), 1))
    dprompts, dembeds = prefix_concat.prefix_concat_backward(torch.ones_like(out), source, P, T, True, True)
    assert torch.equal(dprompts, torch.full((P, 5), float(B), device=DEVICE)) and torch.equal(
        dembeds, torch.ones_like(embeds)
    )


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, rounded_ptr, K, PRECISION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k0 in range(0, K, BLOCK):
        a, b = (
            tl.load(a_ptr + i[:, None] * K + k0 + i[None, :]),
            tl.load(b_ptr + (k0 + i)[:, None] * BLOCK + i[None, :]),
        )
        total = tl.dot(a, b, total, input_precision=PRECISION)
    tl.store(out_ptr + i[:, None] * BLOCK + i[None, :], total)
    tl.store(rounded_ptr + i[:, None] * BLOCK + i[None, :], total.to(tl.bfloat16) * 2.0 - 1.0)


@interpreted
@pytest.mark.parametrize(("dtype", "precision", "least", "most"), [
    (torch.bfloat16, "ieee", 0.0, 1e-6),
    (torch.float32, "ieee", 0.0, 1e-6),
    (torch.float32, "tf32", 1e-5, 1e-3),  # the interpreter must show what tf32 loses
], ids=str)  # fmt: skip
def test_the_interpreter_computes_products(dtype, precision, least, most):
    a, b = torch.randn(16, 48).to(dtype), torch.randn(48, 16).to(dtype)
    out, rounded = torch.empty(16, 16), torch.empty(16, 16, dtype=torch.bfloat16)
    product_kernel[(1,)](a, b, out, rounded, 48, PRECISION=precision, BLOCK=16)
    exact = a.double() @ b.double()
    error = float((out - exact).abs().max() / exact.abs().max())
    assert least <= error <= most
    assert torch.equal(rounded, out.bfloat16() * 2 - 1)


@triton.jit
def cast_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.load(x_ptr + i))


@interpreted
def test_the_interpreter_rounds_to_bfloat16_as_torch_does():
    patterns = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int64).to(torch.int32)
    ties = (torch.arange(1024, dtype=torch.int32) << 16) + 0x3F808000
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-40, -1e-45]).view(torch.int32)
    x = torch.cat((patterns, ties, special, torch.zeros(8192 - 4096 - 1024 - 8, dtype=torch.int32))).view(torch.float32)
    out, back = torch.empty(8192, dtype=torch.bfloat16), torch.empty(8192)
    cast_kernel[(1,)](x, out, BLOCK=8192)
    cast_kernel[(1,)](out, back, BLOCK=8192)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(back, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


@interpreted
def test_the_interpreter_takes_the_first_of_several_configurations():
    configs = [triton.Config({"BLOCK": 8}), triton.Config({"BLOCK": 16})]
    x, out = torch.randn(8), torch.zeros(16)
    triton.autotune(configs, key=[])(cast_kernel)[(1,)](x, out)
    assert torch.equal(out, torch.cat((x, torch.zeros(8))))
