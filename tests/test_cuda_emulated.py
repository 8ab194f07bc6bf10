"""The CUDA C++ kernels on an emulated card (emulated.py): the tests of each operator, and what is special to a card.

Every test runs with the threads of a block, and the blocks, in ascending and in descending order: a missing barrier makes the two differ.
`make sanitize` runs them under AddressSanitizer and UndefinedBehaviorSanitizer: a read or write outside a tensor or outside shared memory ends them.
"""

import ctypes
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import emulated
import pytest
import torch
from bounds import assert_within_bound, dense, double, gapped, make_layer, next_seed, print_accepted, transposed
from test_prefix_concat import (  # noqa: F401  (run here, too, with RUNS)
    raw_arguments,
    test_by_hand,
    test_dtypes,
    test_each_row_is_that_row_alone,
    test_gradients_where_only_some_are_wanted,
    test_ids_equal_embeddings,
    test_layouts,
    test_masks_keep_their_dtype,
    test_no_width,
    test_numbers_that_do_not_exist,
    test_one_tensor_of_prompts,
    test_only_what_is_needed,
    test_prompt_lengths,
    test_two_runs_are_equal,
    test_wide_rows,
    test_without_gradients,
    with_ids,
)

from fastlora import ops, reference

RUNS = [("cpu", "cuda")]

pytestmark = pytest.mark.skipif(not emulated.available(), reason="needs a C++20 compiler")


@pytest.fixture(scope="module")
def card() -> ctypes.CDLL:
    return emulated.load()


@pytest.fixture(autouse=True, params=["ascending", "descending"])
def order(request: pytest.FixtureRequest, card: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The operators of the emulated card are entered as those of CUDA C++."""
    monkeypatch.setenv(ops.EMULATORS["cuda"], "1")
    monkeypatch.setattr(ops, "implementations", {**ops.implementations, **emulated.operators()})
    card.emulated_descending(request.param == "descending")
    yield request.param
    card.emulated_descending(0)


def test_lora_linear_takes_any_dy() -> None:
    """One row of dy for all rows of x, as a mean's gradient is; and one whose rows lie across."""
    layer = make_layer(24, 40, 32, 4, torch.bfloat16)
    x, weight, _, lora_a, lora_b, dy = (tensor.detach() for tensor in layer)
    xa, keep = torch.zeros(24, 4), torch.empty(0, dtype=torch.uint8)
    backward = ops.implementation("lora_linear_backward", "cuda")
    for odd in (dy[:1].expand(24, 32), transposed(dy)):
        arguments = x, weight, lora_a, lora_b, xa, keep, 1.5, 0.0, True, True, True
        for got, right in zip(backward(odd, *arguments), backward(odd.clone(), *arguments), strict=True):
            assert torch.equal(got, right)


def wide_batch(
    dtype: torch.dtype, D: int, B: int = 3, T: int = 300, P: tuple[int, ...] = (33, 0, 64)
) -> dict[str, Any]:
    """Rows longer than what a block looks at in one step; B rows padded on the left, on the right, on both sides and not at all, by turns."""
    mask = torch.rand(B, T) < 0.9
    mask[0::4, : T // 3] = False
    mask[1::4, T // 2 :] = False
    mask[3::4] = True
    return {
        "prompts": torch.randn(sum(P), D),
        "starts": torch.tensor([0, *P]).cumsum(0),
        "max_prompt": max(P),
        "prompt_index": torch.randint(0, len(P), (B,)),
        "embeds": torch.randn(B, T, D).to(dtype),
        "input_ids": None,
        "embedding": None,
        "attention_mask": mask,
        "position_ids": torch.randint(0, T, (B, T)),
        "labels": torch.randint(0, 99, (B, T)),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("D", [264, 250])  # in packs of 16 bytes, and not
def test_long_rows_are_the_references(dtype: torch.dtype, D: int) -> None:
    """To the bit: copies, prompts rounded once, and sums in float32 in the batch's order."""
    arguments = wide_batch(dtype, D)
    for case in (
        arguments,
        {**arguments, "prompts": arguments["prompts"].to(dtype)},
        {**arguments, "labels": None, "position_ids": None},
    ):
        expected = reference.prefix_concat(*case.values())
        got = torch.ops.fastlora.prefix_concat_cuda(*case.values())
        for one, other in zip(got, expected, strict=True):
            assert one.dtype == other.dtype and torch.equal(one, other)
    dout = torch.randn(expected[0].shape).to(dtype)
    for given in (dout, gapped(dout)):
        backward = (given, expected[4], len(arguments["prompts"]), 300, True, True)
        for one, other in zip(
            torch.ops.fastlora.prefix_concat_backward_cuda(*backward),
            reference.prefix_concat_backward(*backward),
            strict=True,
        ):
            assert one.dtype == other.dtype and torch.equal(one, other)


def test_many_rows() -> None:
    """More rows of the batch than a block's threads; enough columns that a block takes 32 of them."""
    arguments = wide_batch(torch.float32, 3, B=301, T=50, P=(2, 5))
    expected = reference.prefix_concat(*arguments.values())
    for one, other in zip(torch.ops.fastlora.prefix_concat_cuda(*arguments.values()), expected, strict=True):
        assert torch.equal(one, other)
    backward = (torch.randn(301, 55, 3), expected[4], 7, 50, True, True)
    for one, other in zip(
        torch.ops.fastlora.prefix_concat_backward_cuda(*backward),
        reference.prefix_concat_backward(*backward),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_numbers_out_of_range_are_never_addresses() -> None:
    """Starts and sources that no forward writes: NaN, or nothing. (make sanitize sees where they would have read.)"""
    right = raw_arguments()
    for starts in ([0, 2, 5, 90], [-7, 2, 5, 6], [6, 5, 2, 0], [2**62, -(2**62), 2**62, 0]):
        out, mask, *_ = torch.ops.fastlora.prefix_concat_cuda(*{**right, "starts": torch.tensor(starts)}.values())
        assert out.shape == (2, 7, 5) and not (out.isnan().any(-1) & (mask == 0)).any()
    dout = torch.randn(2, 7, 5)
    first_beyond = 6 + 2 * 4  # prompt rows and tokens
    for source in (2**62, -(2**62), -1, first_beyond - 1, first_beyond):
        given = torch.full((2, 7), source)
        dprompts, dembeds = torch.ops.fastlora.prefix_concat_backward_cuda(dout, given, 6, 4, True, True)
        assert dprompts.shape == (6, 5) and not dprompts.any()
        assert bool(dembeds.any()) == (source == first_beyond - 1) and not dembeds[:, :-1].any()


WRONG: dict[str, tuple[str, dict[str, Any]]] = {
    "attention_mask: 1-D": ("attention_mask", {"attention_mask": torch.ones(4)}),
    "attention_mask: complex": ("attention_mask", {"attention_mask": torch.ones(2, 4, dtype=torch.complex64)}),
    "max_prompt: negative": ("max_prompt", {"max_prompt": -1}),
    "prompts: integers": ("prompts", {"prompts": torch.ones(6, 5, dtype=torch.int64)}),
    "prompts: another D": ("prompts", {"prompts": torch.ones(6, 4)}),
    "starts: int32": ("starts", {"starts": torch.tensor([0, 2, 5, 6], dtype=torch.int32)}),
    "starts: one": ("starts", {"starts": torch.tensor([0])}),
    "prompt_index: another B": ("prompt_index", {"prompt_index": torch.zeros(3, dtype=torch.int64)}),
    "embeds: float64": ("embeds", {"embeds": torch.ones(2, 4, 5).double()}),
    "embeds: another T": ("embeds", {"embeds": torch.ones(2, 3, 5)}),
    "embeds: none": ("embeds", {"embeds": None}),
    "input_ids: floats": ("input_ids", {**with_ids(raw_arguments()), "input_ids": torch.ones(2, 4)}),
    "embedding: empty": ("embedding", {**with_ids(raw_arguments()), "embedding": torch.ones(0, 5)}),
    "position_ids: another T": ("position_ids", {"position_ids": torch.zeros(2, 3, dtype=torch.int64)}),
    "labels: int32": ("labels", {"labels": torch.zeros(2, 4, dtype=torch.int32)}),
}
WRONG_BACKWARD: dict[str, tuple[str, dict[str, Any]]] = {
    "dout: float64": ("dout", {"dout": torch.ones(2, 7, 5).double()}),
    "dout: 2-D": ("dout", {"dout": torch.ones(2, 7)}),
    "source: another W": ("source", {"source": torch.zeros(2, 6, dtype=torch.int64)}),
    "source: int32": ("source", {"source": torch.zeros(2, 7, dtype=torch.int32)}),
    "prompt_rows: negative": ("prompt_rows", {"prompt_rows": -1}),
    "tokens: negative": ("tokens", {"tokens": -1}),
}


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    """Each is refused by the operator itself, with a message that names it."""
    print_accepted("prefix_concat_cuda", raw_arguments(), WRONG)
    right = {"dout": torch.ones(2, 7, 5), "source": torch.zeros(2, 7, dtype=torch.int64), "prompt_rows": 6, "tokens": 4}
    print_accepted("prefix_concat_backward_cuda", {**right, "need_prompts": True, "need_embeds": True}, WRONG_BACKWARD)
    assert capsys.readouterr().out == ""


# The emulated card itself.


@pytest.fixture
def run(order: str) -> Callable[[str, torch.Tensor, int, int], str | None]:
    """Launch a kernel of emulated_check.cu by name, on the memory of a tensor; what the exception says, if there is one."""
    library = ctypes.CDLL(str(emulated.build([emulated.ROOT / "tests/emulated_check.cu"])))
    library.check.restype = ctypes.c_char_p
    library.emulated_descending(order == "descending")

    def launch(kernel: str, memory: torch.Tensor, blocks: int, threads: int) -> str | None:
        said = library.check(kernel.encode(), ctypes.c_void_p(memory.data_ptr()), blocks, threads)
        return said and said.decode()

    return launch


def test_shuffles_and_barriers(run: Any) -> None:
    memory = torch.arange(1003, dtype=torch.int32)
    assert run("sum", memory, 3, 256) is None
    assert memory[:3].tolist() == [sum(range(3, 1003))] * 3


def test_threads_that_leave_are_not_waited_for(run: Any) -> None:
    votes = torch.zeros(96, dtype=torch.int32)
    assert run("leave_early", votes, 1, 96) is None
    assert votes.tolist() == [0] * 40 + [-256] * 24 + [-1] * 32  # lanes 8 to 31 of the second warp are left


def test_blocks_that_wait_for_others(run: Any) -> None:
    flags = torch.zeros(33, dtype=torch.int32)
    assert run("wait", flags, 4, 32) is None
    assert flags.tolist() == [96] + [7] * 32


def test_a_missing_barrier_shows(run: Any, order: str) -> None:
    """Shared memory is all ones, -1, before it is written: only the last thread to run finds its neighbour's."""
    out = torch.zeros(64, dtype=torch.int32)
    assert run("race", out, 1, 64) is None
    assert out.tolist() == ([-1] * 63 + [1] if order == "ascending" else [1] * 63 + [-1])


@pytest.mark.parametrize(
    ("kernel", "threads", "message"),
    [
        ("diverge", 32, "lanes of one warp meet at different instructions"),
        ("hang", 32, "wait for one another forever"),
        ("wait_forever", 32, "wait for one another forever"),
        ("trap", 32, r"trap \(block 0,0,0"),
        ("sum", 2048, "no card can launch this"),
        ("sum", 0, "no card can launch this"),
    ],
)
def test_what_a_card_would_not_survive_is_an_exception(run: Any, kernel: str, threads: int, message: str) -> None:
    said = run(kernel, torch.zeros(2000, dtype=torch.int32), 1, threads)
    assert said and re.search(message, said)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_lora_linear_with_any_strides(dropout_p: float) -> None:
    """Rows that cannot be read 16 bytes at a time: an odd K, gaps, a weight that lies by column, rows of dy that are one."""
    x, weight, bias, lora_a, lora_b, dy = make_layer(19, 37, 29, 5, torch.bfloat16, torch.float32)
    dy = dy[:1].expand_as(dy)
    given = [gapped(x), transposed(weight), bias, gapped(lora_a), transposed(lora_b)]
    given = [tensor.detach() for tensor in given]
    seed = next_seed("cpu", 1) if dropout_p else None

    def run(forward: Callable[..., Any], backward: Callable[..., Any], numbers: Callable[[Any], Any]) -> list[Any]:
        x, weight, bias, lora_a, lora_b = map(numbers, given)
        y, xa, keep = forward(x, weight, bias, lora_a, lora_b, 1.7, dropout_p, seed)
        keep = torch.cat((keep.new_zeros(1), keep.flatten()))[1:].view_as(keep)  # at an odd address
        return [y, xa, *backward(numbers(dy), x, weight, lora_a, lora_b, xa, keep, 1.7, dropout_p, True, True, True)]

    fastlora_ops = torch.ops.fastlora
    found = run(fastlora_ops.lora_linear_cuda, fastlora_ops.lora_linear_backward_cuda, lambda tensor: tensor)
    eager = run(reference.lora_linear, reference.lora_linear_backward, dense)
    exact = run(reference.lora_linear, reference.lora_linear_backward, double)
    for name, value, near, right in zip(("y", "xa", "dx", "da", "db"), found, eager, exact, strict=True):
        assert_within_bound(name, value, near, right)


def test_wrong_arguments_to_lora_linear(capsys: pytest.CaptureFixture[str]) -> None:
    x, weight, bias, lora_a, lora_b, dy = (
        None if t is None else t.detach() for t in make_layer(4, 16, 8, 2, torch.bfloat16)
    )
    right = {
        "x": x, "weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b, "scale": 1.0, "dropout_p": 0.5,
        "seed": torch.tensor(3),
    }  # fmt: skip
    print_accepted("lora_linear_cuda", right, {
        "float32": ("x", {"x": x.float(), "weight": weight.float(), "bias": bias.float()}),
        "a row": ("x", {"x": x[0]}),
        "weight of another K": ("weight", {"weight": weight[:, :8]}),
        "weight of another dtype": ("weight", {"weight": weight.half()}),
        "bias of another N": ("bias", {"bias": bias[:3]}),
        "A of another K": ("lora_a", {"lora_a": lora_a[:, :8]}),
        "no rank": ("lora_a", {"lora_a": lora_a[:0], "lora_b": lora_b[:, :0]}),
        "a rank of more than 512": ("lora_a", {"lora_a": x.new_zeros(513, 16), "lora_b": x.new_zeros(8, 513)}),
        "B of another rank": ("lora_b", {"lora_b": lora_b[:, :1]}),
        "A and B of two dtypes": ("lora_b", {"lora_b": lora_b.float()}),
        "a probability above 1": ("dropout_p", {"dropout_p": 1.5}),
        "two seeds": ("seed", {"seed": torch.tensor([1, 2])}),
        "a seed of another dtype": ("seed", {"seed": torch.tensor(3, dtype=torch.int32)}),
    })  # fmt: skip
    _, xa, keep = torch.ops.fastlora.lora_linear_cuda(*right.values())
    backward = {
        "dy": dy, "x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, "xa": xa, "keep": keep, "scale": 1.0,
        "dropout_p": 0.5, "need_dx": True, "need_da": True, "need_db": True,
    }  # fmt: skip
    print_accepted("lora_linear_backward_cuda", backward, {
        "dy of another N": ("dy", {"dy": dy[:, :3]}),
        "dy of another dtype": ("dy", {"dy": dy.float()}),
        "xa of another rank": ("xa", {"xa": xa[:, :1]}),
        "xa of another dtype": ("xa", {"xa": xa.double()}),
        "keep of another dtype": ("keep", {"keep": keep.float()}),
        "keep of fewer rows": ("keep", {"keep": keep[:2]}),
    })  # fmt: skip
    assert capsys.readouterr().out == ""


class Shared(NamedTuple):
    """Layers of `lora_linear` that share x; each one's N and R."""

    M: int
    K: int
    layers: tuple[tuple[int, int], ...]
    dtype: torch.dtype = torch.bfloat16
    adapter_dtype: torch.dtype | None = None
    dropout_p: tuple[float, ...] = ()  # a layer's; none: no dropout


SHARED = {
    "three layers": Shared(70, 96, ((40, 8), (24, 8), (24, 8))),
    "other ranks, one drops nothing": Shared(37, 65, ((40, 3), (17, 20), (24, 1)), torch.float16, torch.float32, (0.3, 0.0, 0.5)),
    "several tiles": Shared(150, 280, ((48, 16), (136, 5)), dropout_p=(0.1, 0.4)),
    "one layer": Shared(5, 33, ((9, 2),), dropout_p=(0.2,)),
    "no rows": Shared(0, 16, ((8, 2), (8, 2)), dropout_p=(0.1, 0.1)),
}  # fmt: skip


def make_shared(case: Shared) -> tuple[list[Any], list[Any], list[torch.Tensor]]:
    """x, weights, biases, A and B, in layouts that cannot all be read 16 bytes at a time; scales, probabilities and seeds; every dy."""
    made = [make_layer(case.M, case.K, N, R, case.dtype, case.adapter_dtype) for N, R in case.layers]
    weight, bias, a, b, dy = ([one[i].detach() for one in made] for i in range(1, 6))
    weight[-1], a[-1], bias[0] = transposed(weight[-1]), gapped(a[-1]), bias[0].new_empty(0)
    G = len(made)
    seed = torch.randint(2**62, (G,)) if case.dropout_p else None
    numbers = [[1.7 / (1 + i) for i in range(G)], list(case.dropout_p or (0.0,) * G), seed]
    return [made[0].x.detach(), weight, bias, a, b], numbers, dy


def run_shared(
    tensors: list[Any], numbers: list[Any], dy: list[torch.Tensor], of: Callable[[str], Any], widened: Callable[[Any], Any]
) -> dict[str, Any]:  # fmt: skip
    """By name, each y, xa, keep, dx, da, db of what `of` gives for an operator's name."""
    x, weight, bias, a, b = (
        widened(one) if isinstance(one, torch.Tensor) else list(map(widened, one)) for one in tensors
    )
    scale, p, seed = numbers
    ys, xa, keep = of("lora_linear_shared")(x, weight, bias, a, b, scale, p, seed)
    grads = of("lora_linear_shared_backward")(
        list(map(widened, dy)), x, weight, a, b, xa, keep, scale, p, True, True, True
    )
    named = dict(zip(("xa", "keep", "dx", "da", "db"), (xa, keep, *grads), strict=True))
    return {**{f"y[{i}]": y for i, y in enumerate(ys)}, **named}


def check_shared(case: Shared, move: Callable[[Any], Any] = lambda value: value) -> None:
    tensors, numbers, dy = (move(part) for part in make_shared(case))

    def by_cuda(op: str) -> Any:
        return getattr(torch.ops.fastlora, f"{op}_cuda")

    def by_reference(op: str) -> Any:
        return getattr(reference, op)

    found, again = (run_shared(tensors, numbers, dy, by_cuda, lambda one: one) for _ in range(2))
    eager = run_shared(tensors, numbers, dy, by_reference, dense)
    exact = run_shared(tensors, numbers, dy, by_reference, double)
    for name, value in found.items():
        assert torch.equal(value, again[name]) or name == "keep", name
        if name != "keep":
            assert_within_bound(name, value, eager[name], exact[name])
            continue
        assert value.shape == eager["keep"].shape
        for i, p in enumerate(case.dropout_p):
            if p:
                assert torch.equal(reference.read_keep(value[i], case.K), reference.read_keep(eager["keep"][i], case.K))


@pytest.mark.parametrize("capability", [80, 90], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("case", SHARED.values(), ids=SHARED)
def test_layers_that_share_x(card: ctypes.CDLL, case: Shared, capability: int) -> None:
    """dx is summed where it is written: each layer adds to what those before have left."""
    card.emulated_capability(capability)
    try:
        check_shared(case)
    finally:
        card.emulated_capability(80)


def test_wrong_arguments_to_layers_that_share_x(capsys: pytest.CaptureFixture[str]) -> None:
    (x, weight, bias, a, b), (scale, p, seed), dy = make_shared(Shared(4, 16, ((8, 2), (6, 3)), dropout_p=(0.5, 0.1)))
    right = {
        "x": x, "weight": weight, "bias": bias, "lora_a": a, "lora_b": b, "scale": scale, "dropout_p": p, "seed": seed,
    }  # fmt: skip
    print_accepted("lora_linear_shared_cuda", right, {
        "no layer": ("weight", {name: [] for name in ("weight", "bias", "lora_a", "lora_b", "scale", "dropout_p")}),
        "a bias too few": ("bias", {"bias": bias[:1]}),
        "weight of another K": ("weight", {"weight": [weight[0], weight[1][:, :8]]}),
        "A of another K": ("lora_a", {"lora_a": [a[0], a[1][:, :8]]}),
        "B of another rank": ("lora_b", {"lora_b": [b[0], b[1][:, :1]]}),
        "adapters of two dtypes": ("lora_a", {"lora_a": [a[0], a[1].float()], "lora_b": [b[0], b[1].float()]}),
        "one seed": ("seed", {"seed": seed[:1]}),
        "a scale too few": ("scale", {"scale": scale[:1]}),
        "a probability above 1": ("dropout_p", {"dropout_p": [0.5, 1.5]}),
    })  # fmt: skip
    _, xa, keep = torch.ops.fastlora.lora_linear_shared_cuda(*right.values())
    backward = {
        "dy": dy, "x": x, "weight": weight, "lora_a": a, "lora_b": b, "xa": xa, "keep": keep, "scale": scale, "dropout_p": p,
        "need_dx": True, "need_da": True, "need_db": True,
    }  # fmt: skip
    print_accepted("lora_linear_shared_backward_cuda", backward, {
        "a dy too few": ("dy", {"dy": dy[:1]}),
        "dy of another N": ("dy", {"dy": [dy[0], dy[1][:, :3]]}),
        "xa of one layer": ("xa", {"xa": xa[:, :2]}),
        "keep of one layer": ("keep", {"keep": keep[0]}),
        "keep of fewer rows": ("keep", {"keep": keep[:, :2]}),
    })  # fmt: skip
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_layers_that_share_x_give_what_is_needed(needs: tuple[bool, bool, bool]) -> None:
    (x, weight, bias, a, b), (scale, p, seed), dy = make_shared(SHARED["three layers"])
    _, xa, keep = torch.ops.fastlora.lora_linear_shared_cuda(x, weight, bias, a, b, scale, p, seed)
    backward = torch.ops.fastlora.lora_linear_shared_backward_cuda
    everything, some = (backward(dy, x, weight, a, b, xa, keep, scale, p, *wanted) for wanted in ((True,) * 3, needs))
    for whole, part, need in zip(everything, some, needs, strict=True):
        assert torch.equal(part, whole) if need else part.numel() == 0
