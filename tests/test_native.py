"""What is special to the native extension: every instruction set, dropout's bits, its conversions, threads, processes, and far rows.

Which instruction set runs is decided once a process, so each is checked in a process of its own, and by `make emulate` on emulated CPUs that
have no wider one. The equations themselves are tested, for every implementation, by test_<operator>.py.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from bounds import (
    INPUTS,
    Compared,
    Layer,
    assert_within_bound,
    assert_within_bound_over_inputs,
    dense,
    double,
    gapped,
    make_layer,
    run_apart,
    transposed,
)
from lora_arguments import Arguments, one_layer
from test_product import check_shapes
from test_quantised import check_elements, check_products
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastlora import environment, functional, ops, reference

ISAS = ("portable", "avx2", "avx512", "avx512bf16", "amx")  # each machine that has one has those before it
NEEDED = {"amx_emulated": "avx512bf16"}
SHAPES = ((1, 8, 8, 1), (5, 17, 33, 3), (3, 64, 2000, 40), (33, 1030, 77, 7), (70, 600, 130, 16))  # M, K, N, R
EMULATED = {"Nehalem": "portable", "Haswell": "avx2"}  # a CPU that QEMU knows -> the widest of ISAS that it has
THREADED = ((1, 4096, 512, 8), (64, 700, 1500, 5), (200, 64, 64, 130))

pytestmark = pytest.mark.skipif(
    not ops.availability()[1].present,
    reason="the native extension is not built (make demo, or pip install -e . with g++)",
)


def run(
    layer: tuple, scale: float, p: float, seed: Tensor | None, implementation: str = "cpu", xa: Tensor | None = None
) -> list[Tensor]:
    """y, xa, dx, da, db of a `bounds.Layer`, computed without autograd."""
    return one_layer(layer, scale, p, seed).both(implementation, [layer[5].detach()], xa)


def assert_near_reference(layer: tuple, p: float, got: list[Tensor], seed: Tensor) -> None:
    for name, results in beside_reference(layer, p, got, seed).items():
        assert_within_bound(name, *results)


def assert_near_reference_over_inputs(draw: Callable[[], Layer], p: float, seed: Tensor, inputs: int = INPUTS) -> None:
    def compute() -> dict[str, Compared]:
        layer = draw()
        return beside_reference(layer, p, run(layer, 1.5, p, seed), seed)

    assert_within_bound_over_inputs(compute, inputs)


def beside_reference(layer: tuple, p: float, got: list[Tensor], seed: Tensor) -> dict[str, Compared]:
    """What `run` got, each result with eager's and the exact one."""
    dtype = layer[0].dtype
    exact = run(Layer(*map(double, layer)), 1.5, p, seed, "reference")
    narrow = Layer(*(None if t is None else dense(t).to(dtype) for t in layer))
    # In 16 bits the backward may round the exact xa once; in float32 eager has its own, with the error of its own sums.
    eager_given = run(narrow, 1.5, p, seed, "reference", xa=exact[1].to(dtype))
    eager = run(narrow, 1.5, p, seed, "reference") if dtype is torch.float32 else eager_given
    # And the backward by itself: both are given the exact xa, so that the bound is of its own roundings alone.
    got_given = run(layer, 1.5, p, seed, xa=exact[1].to(got[1].dtype))
    values, near, right = ([*one, last[-1]] for one, last in ((got, got_given), (eager, eager_given), (exact, exact)))
    compared = ((value, n.to(value.dtype), r) for value, n, r in zip(values, near, right, strict=True))
    return dict(zip(("y", "xa", "dx", "da", "db", "db of the exact xa"), compared, strict=True))


def update(y: list[Tensor], *args: Any) -> tuple[Tensor, Tensor]:
    """xa and keep; adds to y what lora_linear adds to frozen products, of rows that all have the same adapters."""
    return torch.ops.fastlora.lora_update_cpu(y, *args, None, None)


def check_masks() -> None:
    # The largest draws every half-word a few times, the threshold itself too.
    for seed, p, M, K in (
        (3, 0.25, 512, 512),
        (7, 0.5, 5, 200),
        (-1, 0.1, 3, 77),
        (2**63 - 1, 1 / 65536, 40, 256),
        (1 << 40, 0.95, 1, 9),
    ):
        drawn = torch.tensor([seed])
        mask = reference.keep_mask(drawn, torch.arange(M), K, p)
        factor = torch.tensor(reference.keep_scale(p), dtype=torch.float32)
        expected = torch.where(mask, factor, 0.0)
        x, y = torch.ones(M, K), torch.zeros(M, M)
        xa, keep = update([y], x, [torch.eye(K)], [torch.zeros(M, K)], [1.0], [p], drawn)
        assert torch.equal(xa[0], expected) and not y.any(), f"forward, seed {seed}"
        assert torch.equal(reference.read_keep(keep[0], K), mask), f"keep, seed {seed}"
        kept, alone = torch.ops.fastlora.draw_dropout_cpu(x, p, drawn)
        assert torch.equal(kept, expected) and torch.equal(reference.read_keep(alone, K), mask), f"alone, seed {seed}"
        # dxa is the identity where dy and B are: dA = d(x), and dx = d'(A).
        one, dx = torch.eye(M), torch.zeros(M, K)
        da, _ = torch.ops.fastlora.lora_update_backward_cpu(
            dx, [one], x, [x], [one], torch.zeros(1, M, M), keep, [1.0], [p], None, None, True, False
        )
        assert torch.equal(dx, expected), f"dx, seed {seed}"
        assert torch.equal(da.view(M, K), expected), f"da, seed {seed}"


def check_conversions() -> None:
    """Every 16-bit number is read as torch reads it, and rounded as torch rounds it; but AVX512-BF16 knows no subnormal numbers."""

    def flushed(value: Tensor, dtype: torch.dtype) -> Tensor:
        flushes = dtype == torch.bfloat16 and fastlora._C.isa() in ("avx512bf16", "amx", "amx_emulated")
        return torch.where(value.abs() < torch.finfo(dtype).tiny, 0.0, value) if flushes else value

    import fastlora._C

    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[:, None]
        one = torch.ones(1, 1)
        xa, _ = update([torch.zeros_like(x)], x, [one], [one], [1.0], [0.0], None)
        assert torch.equal(xa[0].nan_to_num(1.25), flushed(x.float(), dtype).nan_to_num(1.25))
        finite = x[x.isfinite()][:, None]
        for scale in (1 / 3, 3.0, 2.0**-14):
            y = torch.zeros_like(finite)
            update([y], finite, [one], [one], [scale], [0.0], None)
            product = flushed(finite.float(), dtype) * torch.tensor(scale, dtype=torch.float32)
            assert torch.equal(y, flushed(product, dtype).to(dtype))


def check_layers() -> None:
    torch.manual_seed(0)
    inputs = 1 if os.environ.get("QEMU") else INPUTS  # an emulated CPU takes a minute for one
    seed = torch.tensor([20_000_000_000])
    for M, K, N, R in SHAPES:
        for dtype, adapter in ((torch.float32, None), (torch.bfloat16, torch.float32), (torch.float16, None)):
            draw = functools.partial(make_layer, M, K, N, R, dtype, adapter)
            for p in (0.0, 0.1):
                assert_near_reference_over_inputs(draw, p, seed, inputs)


def check_far_rows() -> None:
    """Rows more than 2**31 elements apart; the memory between them is never touched."""
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((2, 40), (2**31 + 8, 1))
    layer = make_layer(2, 40, 24, 4, torch.bfloat16)
    near = run(layer, 1.5, 0.3, torch.tensor([3]))
    with torch.no_grad():
        far.copy_(layer.x)
    for got, right in zip(run(layer._replace(x=far), 1.5, 0.3, torch.tensor([3])), near, strict=True):
        assert torch.equal(got, right)


def check_instruction_set() -> None:
    import fastlora._C

    assert fastlora._C.isa() == os.environ["EXPECTED_ISA"]
    check_masks()
    check_conversions()
    check_layers()
    check_far_rows()


def name_instruction_set() -> None:
    import fastlora._C

    print(fastlora._C.isa())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_few_rows_of_each_adapter_are_the_same_on_any_threads(dtype: torch.dtype) -> None:
    """Threads share ranks and columns evenly, whatever the ranks: where one begins changes no sum."""
    draw = torch.Generator().manual_seed(3)
    ranks = (1, 4, 7, 8, 9, 16, 31, 64, 100)
    a, b = ([torch.randn(shape, generator=draw).to(dtype) for shape in shapes] for shapes in
            ([(r, 700) for r in ranks], [(1030, r) for r in ranks]))  # fmt: skip
    x, order = torch.randn(30, 700, generator=draw).to(dtype), torch.randperm(30, generator=draw)
    offsets = torch.tensor([0, 2, *(2 + 3 * i for i in range(1, 9)), 30, 30])
    before, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            y = torch.ones(30, 1030, dtype=dtype)
            xa, _ = torch.ops.fastlora.lora_update_cpu([y], x, a, b, [0.5] * 9, [0.0] * 9, None, order, offsets)
            results.append((y, xa))
    finally:
        torch.set_num_threads(before)
    for y, xa in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(xa, results[0][1])
    exact = torch.ones(30, 1030, dtype=torch.double)
    for i, (one, other) in enumerate(zip(a, b, strict=True)):
        rows = order[offsets[i + 1] : offsets[i + 2]]
        exact[rows] += 0.5 * x[rows].double() @ one.double().t() @ other.double().t()
    assert torch.equal(results[0][0][order[:2]], torch.ones(2, 1030, dtype=dtype))  # rows without an adapter
    torch.testing.assert_close(
        results[0][0].double(), exact, rtol=8 * torch.finfo(dtype).eps, atol=8e-3 if dtype != torch.float32 else 1e-3
    )


@pytest.mark.parametrize("isa", [*ISAS, *NEEDED])
def test_every_instruction_set(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTLORA_ISA", raising=False)
    best = run_apart("test_native", name_instruction_set).strip()
    if ISAS.index(NEEDED.get(isa, isa)) > ISAS.index(best):
        pytest.skip(f"this machine has no {NEEDED.get(isa, isa)}, only {best}")
    monkeypatch.setenv("FASTLORA_ISA", isa)
    monkeypatch.setenv("EXPECTED_ISA", isa)
    run_apart("test_native", check_instruction_set)
    run_apart("test_product", check_shapes)
    run_apart("test_quantised", check_elements)
    run_apart("test_quantised", check_products)


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_ISA", "avx1024")
    with pytest.raises(
        AssertionError, match="FASTLORA_ISA=avx1024: expected portable, avx2, avx512, avx512bf16, amx or amx_emulated"
    ):
        run_apart("test_native", name_instruction_set)


def print_environment() -> None:
    print([one.detail for one in environment.all_findings() if one.name == "cpu"])


def test_the_environment_tells_of_an_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTLORA_ISA", "avx1024")
    assert "FASTLORA_ISA=avx1024: expected portable" in run_apart("test_native", print_environment)


@pytest.mark.skipif(not os.environ.get("QEMU"), reason="QEMU does not name an emulator: `make emulate` runs this")
@pytest.mark.parametrize("cpu", EMULATED)
def test_an_emulated_cpu(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets the widest instruction set that it has, unasked, and a clear refusal of a wider one, not an illegal instruction."""
    emulator = (os.environ["QEMU"], "-cpu", cpu)
    for name in ("FASTLORA_ISA", "OPENBLAS_CORETYPE", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"):
        monkeypatch.delenv(name, raising=False)  # what they say of this machine would be believed of the emulated one
    monkeypatch.setenv("EXPECTED_ISA", EMULATED[cpu])
    run_apart("test_native", check_instruction_set, emulator)
    wider = ISAS[ISAS.index(EMULATED[cpu]) + 1]
    monkeypatch.setenv("FASTLORA_ISA", wider)
    with pytest.raises(
        AssertionError, match=rf"ended with 1:(.|\n)*FASTLORA_ISA={wider}: this machine does not have it"
    ):
        run_apart("test_native", name_instruction_set, emulator)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def assert_right_twice(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Within the bound, and equal to the bit when computed again."""
    seed, draw = torch.tensor([99]), functools.partial(make_layer, *shape, dtype)
    assert_near_reference_over_inputs(draw, 0.2, seed, INPUTS if shape[0] == 1 else 1)
    layer = draw()
    for once, again in zip(*(run(layer, 1.5, 0.2, seed) for _ in range(2)), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("shape", THREADED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads(threads, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for count in (1, 2, 3, 8):
        threads(count)
        assert_right_twice(shape, dtype)


def check_threads() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    for shape in THREADED:
        for dtype in (torch.float32, torch.bfloat16):
            assert_right_twice(shape, dtype)


def test_two_processes_at_once() -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: run_apart("test_native", check_threads), range(2)))


class Trained(Dataset):
    """What the operators compute, forward and backward, in whichever process asks."""

    def __init__(self) -> None:
        self.layer = make_layer(200, 300, 400, 8)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> list[Tensor]:
        torch.manual_seed(number)
        x, weight, bias, lora_a, lora_b, dy = self.layer
        y = functional.lora_linear(x, weight, bias, lora_a, lora_b, 1.5, dropout_p=0.2)
        mixed = functional.multi_lora(x, weight, bias, [lora_a], [lora_b], [1.5], torch.arange(200) % 2 - 1)
        embeds = functional.prefix_concat(lora_a[None], x[None], torch.ones(1, 200)).embeds
        grads = [torch.autograd.grad(out, (x, lora_a), torch.ones_like(out)) for out in (y, mixed, embeds)]
        return [y.detach(), mixed.detach(), embeds.detach(), *(grad for pair in grads for grad in pair)]


def test_a_forked_worker_computes_the_same(threads) -> None:
    """Though its parent, whose threads the fork leaves behind, has computed before."""
    data = Trained()
    threads(3)
    data[0]
    threads(1)  # as DataLoader tells its workers
    expected = [data[i] for i in range(len(data))]
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60)
    for got, right in zip(loader, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(got, right, strict=True))


def test_a_mixed_batch_is_its_adapters(threads) -> None:
    """Cells that cut through adapters: each row's y and dx are those of its own layer, bit for bit where one thread sums."""
    torch.manual_seed(0)
    base = make_layer(90, 300, 200, 4)
    ranks = (3, 24, 8)
    a, b = [torch.randn(r, 300) for r in ranks], [torch.randn(200, r) for r in ranks]
    index = torch.randint(0, 3, (90,))
    order, offsets = functional.group_rows(index, 3).for_rows(90)
    x, weight, bias, dy = (t.detach() for t in (base.x, base.weight, base.bias, base.dy))
    for count in (1, 2, 3):
        threads(count)
        mixed = Arguments(x, [weight], [bias], a, b, [1.5] * 3, [0.0] * 3, None, order, offsets)
        y, xa, dx, *grads = mixed.both("cpu", [dy])
        for i in range(3):
            mine = index == i
            layer = Layer(x[mine], weight, bias, a[i], b[i], dy[mine])
            got = [y[mine], xa[:, mine, : ranks[i]], dx[mine], grads[i], grads[3 + i]]
            assert_near_reference(layer, 0.0, got, torch.tensor([0]))
            assert not xa[0, mine, ranks[i] :].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(dtype: torch.dtype) -> None:
    """Gaps and transposition change nothing: not even a bit, but for the products that torch itself does."""
    layer = make_layer(20, 70, 50, 6, dtype)
    seed = torch.tensor([11])
    dense = run(layer, 1.5, 0.1, seed)
    loose = layer._replace(
        x=gapped(layer.x), dy=transposed(layer.dy), lora_a=transposed(layer.lora_a), lora_b=gapped(layer.lora_b)
    )
    got = run(loose, 1.5, 0.1, seed)
    assert_near_reference(layer, 0.1, got, seed)
    for one, other in zip(dense[1::2], got[1::2], strict=True):  # xa and da
        assert torch.equal(one, other)


def test_a_keep_with_gaps() -> None:
    layer = make_layer(20, 70, 50, 6)
    arguments = one_layer(layer, 1.5, 0.1, torch.tensor([11]))
    _, xa, keep = arguments.forward("cpu")
    wide = torch.cat((~keep, keep), 2)
    for loose in (wide[:, :, keep.shape[2] :], keep.mT.contiguous().mT):
        grads, others = (arguments.backward("cpu", [layer.dy], xa, bits) for bits in (keep, loose))
        assert all(torch.equal(one, other) for one, other in zip(grads, others, strict=True))


def test_nothing_is_dropped_or_everything() -> None:
    layer = make_layer(4, 40, 24, 3)
    seed = torch.tensor([1])
    for one, other in zip(run(layer, 1.5, 0.0, seed), run(layer, 1.5, 0.0, None), strict=True):
        assert torch.equal(one, other)
    _, xa, _, da, db = run(layer, 1.5, 1.0, seed)
    assert not xa.any() and not da.any() and not db.any()


def test_a_dropped_infinity_is_zero() -> None:
    """As torch.where has it, not inf · 0."""
    x = torch.full((64, 16), torch.inf)
    keep = reference.keep_mask(torch.tensor(4), torch.arange(64), 16, 0.5)
    xa, _ = update([torch.zeros(64, 2)], x, [torch.ones(1, 16)], [torch.zeros(2, 1)], [1.0], [0.5], torch.tensor([4]))
    assert torch.equal(xa[0, :, 0].isinf(), keep.any(1)) and not xa.isnan().any()


def test_it_says_what_it_is() -> None:
    import fastlora._C

    assert fastlora._C.isa() in (*ISAS, *NEEDED)
    cpu = next(one for one in environment.all_findings() if (one.part, one.name) == ("implementation", "cpu"))
    assert cpu.detail.endswith(f"; instruction set: {fastlora._C.isa()}")
    if fastlora._C.cuda:
        assert "compute_90" in fastlora._C.cuda and ops.implementation("prefix_concat", "cuda")
    else:
        assert fastlora._C.cuda is False and fastlora._C.without_cuda
    assert fastlora._C.compiler.split()[0] in ("g++", "clang")
