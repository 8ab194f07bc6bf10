"""prefix_concat: prompts in front of a batch in any padding, every implementation against rows put together by hand."""

from typing import Any, NamedTuple

import pytest
import torch
from bounds import assert_within_bound, gapped, gradients, transposed
from torch import Tensor

from fastlora import ops
from fastlora.functional import Prefixed, prefix_concat, raise_pending

OPERATOR = "prefix_concat"

# 1: a real token. A row of "01" is padded on the left, of "10" on the right; a hole closes up.
MASKS = {
    "full": ["1111", "1111"],
    "left": ["0011", "1111", "0001"],
    "right": ["1100", "1111", "1000"],
    "both sides, row by row": ["0011", "1100", "1111"],
    "both sides of one row": ["0110", "1111"],
    "an empty row": ["0000", "0011", "1111"],
    "an empty row, right": ["0000", "1100"],
    "empty rows only": ["0000", "0000"],
    "holes, right": ["1010", "1110", "1001"],
    "holes, left": ["0101", "0111"],
    "one column": ["1", "0"],
    "no columns": ["", ""],
    "no rows": [],
}


class Batch(NamedTuple):
    """embeds and the prompts require gradients; padding holds NaN, which must not come out."""

    prompts: list[Tensor]  # S of [P_i, D]
    embeds: Tensor  # [B, T, D]
    attention_mask: Tensor  # [B, T]
    prompt_index: Tensor  # [B]


def make_batch(
    mask: list[str],
    lengths: tuple[int, ...] = (2, 3, 1),
    D: int = 5,
    dtype: torch.dtype = torch.float32,
    prompts_dtype: torch.dtype | None = None,
    device: str = "cpu",
) -> Batch:
    B, T, S = len(mask), len(mask[0]) if mask else 3, len(lengths)
    real = torch.tensor([[int(c) for c in row] for row in mask], dtype=torch.int64).reshape(B, T)
    embeds = torch.randn(B, T, D).masked_fill(real[..., None] == 0, torch.nan)
    prompts = [torch.randn(length, D).to(device, prompts_dtype or dtype).requires_grad_() for length in lengths]
    index = torch.arange(B, device=device) * 2 % S  # 0, 2, 1, 0 of three prompts
    return Batch(prompts, embeds.to(device, dtype).requires_grad_(), real.to(device), index)


def by_hand(batch: Batch, labels: Tensor | None = None, position_ids: Tensor | None = None) -> Prefixed:
    """Row by row: the prompt, the real tokens, and the padding on the row's side."""
    prompts, embeds, mask, prompt_index = batch
    B, T, D = embeds.shape
    width = T + max(len(prompt) for prompt in prompts)
    real = mask != 0
    padded_left = [bool(row.any()) and not bool(row[0]) if T else False for row in real]
    rows: dict[str, list[Tensor]] = {"embeds": [], "mask": [], "positions": [], "labels": []}
    for b in range(B):
        prompt = prompts[int(prompt_index[b])]
        whole = bool(real[b].all()) or not bool(real[b].any())
        left = padded_left[b] or (whole and any(padded_left))
        P, tokens = len(prompt), int(real[b].sum())
        content = {
            "embeds": torch.cat((prompt.to(embeds.dtype), embeds[b][real[b]])),
            "mask": torch.cat((mask.new_ones(P), mask[b][real[b]])),
            "positions": torch.arange(P + tokens, device=mask.device),
            "labels": torch.full((P + tokens,), -100, device=mask.device),
        }
        if position_ids is not None:
            content["positions"][P:] = position_ids[b][real[b]] + P
        if labels is not None:
            content["labels"][P:] = labels[b][real[b]]
        for name, values in content.items():
            padding = values.new_full((width - len(values), *values.shape[1:]), -100 if name == "labels" else 0)
            rows[name].append(torch.cat((padding, values) if left else (values, padding)))
    stacked = {
        name: torch.stack(found)
        if found
        else torch.zeros(0, width, *((D,) if name == "embeds" else ()), device=mask.device)
        for name, found in rows.items()
    }
    return Prefixed(
        stacked["embeds"], stacked["mask"], stacked["positions"], None if labels is None else stacked["labels"]
    )


def assert_same(got: Prefixed, expected: Prefixed) -> None:
    for name, value, want in zip(Prefixed._fields, got, expected, strict=True):
        if want is None:
            assert value is None
            continue
        assert value.shape == want.shape, name
        assert not want.numel() or (value.dtype == want.dtype and torch.equal(value, want)), (
            f"{name}: {value} != {want}"
        )


def check(batch: Batch, labels: Tensor | None = None, position_ids: Tensor | None = None) -> None:
    got = prefix_concat(
        batch.prompts,
        batch.embeds,
        batch.attention_mask,
        prompt_index=batch.prompt_index,
        labels=labels,
        position_ids=position_ids,
    )
    expected = by_hand(batch, labels, position_ids)
    assert_same(got, expected)
    dout = torch.randn(got.embeds.shape, device=batch.embeds.device).to(batch.embeds.dtype)
    leaves = (batch.embeds, *batch.prompts)
    dembeds, *dprompts = gradients(got.embeds, leaves, dout)
    eager = (
        [torch.zeros_like(leaf) for leaf in leaves] if not dout.numel() else gradients(expected.embeds, leaves, dout)
    )
    in_double = Batch(
        [prompt.detach().double().requires_grad_() for prompt in batch.prompts],
        batch.embeds.detach().double().requires_grad_(),
        *batch[2:],
    )
    exact = [leaf.double() for leaf in eager]
    if dout.numel():
        exact = gradients(by_hand(in_double).embeds, (in_double.embeds, *in_double.prompts), dout.double())
    assert torch.equal(dembeds, eager[0]), "dembeds"  # a copy: nothing to round
    for i, grads in enumerate(zip(dprompts, eager[1:], exact[1:], strict=True)):
        assert_within_bound(f"dprompts[{i}]", *grads)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_by_hand(device: str, implementation: str, mask: list[str]) -> None:
    batch = make_batch(mask, device=device)
    check(batch)
    labels = torch.randint(0, 9, batch.attention_mask.shape, device=device)
    check(batch, labels=labels, position_ids=torch.randint(0, 9, batch.attention_mask.shape, device=device))


@pytest.mark.parametrize("lengths", [(0,), (1,), (7,), (0, 4), (3, 3), (5, 0, 2, 1)], ids=str)
def test_prompt_lengths(device: str, implementation: str, lengths: tuple[int, ...]) -> None:
    check(make_batch(["011", "111", "001", "111", "000"], lengths, device=device))


def test_no_width(device: str, implementation: str) -> None:
    """No columns and no prompt rows: a result without elements, as a slice would give."""
    check(make_batch(["", ""], (0,), device=device))


DTYPES = {
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "float32 prompts on bfloat16": (torch.bfloat16, torch.float32),
    "float32 prompts on float16": (torch.float16, torch.float32),
    "bfloat16 prompts on float32": (torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize(("dtype", "prompts_dtype"), DTYPES.values(), ids=DTYPES)
def test_dtypes(device: str, implementation: str, dtype: torch.dtype, prompts_dtype: torch.dtype | None) -> None:
    """The result has the embeddings' dtype; many rows share a prompt, so that its gradient is a sum worth rounding once."""
    check(make_batch(["01111", "11111", "00111"] * 3, (4, 2), 33, dtype, prompts_dtype, device))


def test_wide_rows(device: str, implementation: str) -> None:
    check(make_batch(["0" * 9 + "1" * 11, "1" * 20], (5, 9), 300, device=device))


@pytest.mark.parametrize("layout", [gapped, transposed], ids=["gaps", "transposed"])
def test_layouts(device: str, implementation: str, layout: Any) -> None:
    batch = make_batch(["0011", "1111"], device=device)
    wide = torch.full((2, 8), 7, device=device)
    wide[:, ::2] = batch.attention_mask
    embeds = (
        gapped(batch.embeds)
        if layout is gapped
        else batch.embeds.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0)
    )
    check(
        Batch([layout(prompt) for prompt in batch.prompts], embeds.requires_grad_(), wide[:, ::2], batch.prompt_index)
    )


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.bfloat16], ids=str
)
def test_masks_keep_their_dtype(device: str, implementation: str, dtype: torch.dtype) -> None:
    batch = make_batch(["0011", "1111", "0111"], device=device)
    check(batch._replace(attention_mask=batch.attention_mask.to(dtype)))


def test_one_tensor_of_prompts(device: str, implementation: str) -> None:
    """[S, P, D] is a list of S prompts of one length, and its gradient theirs; one prompt needs no prompt_index."""
    batch = make_batch(["011", "111", "001"], (2, 2), device=device)
    stacked = torch.stack(batch.prompts).detach().requires_grad_()
    options = {"prompt_index": batch.prompt_index}
    apart = prefix_concat(batch.prompts, *batch[1:3], **options)
    together = prefix_concat(stacked, *batch[1:3], **options)
    assert_same(together, apart)
    dout = torch.randn_like(apart.embeds)
    (dstacked,) = gradients(together.embeds, [stacked], dout)
    assert torch.equal(dstacked, torch.stack(gradients(apart.embeds, batch.prompts, dout)))
    first = torch.zeros_like(batch.prompt_index)
    assert_same(prefix_concat(stacked[:1], *batch[1:3]), prefix_concat(stacked, *batch[1:3], prompt_index=first))


def test_ids_equal_embeddings(device: str, implementation: str) -> None:
    """Tokens looked up inside are those looked up outside; numbers at padding are never looked at."""
    batch = make_batch(["0011", "1111", "0111"], device=device)
    embedding = torch.randn(7, 5, device=device)
    ids = torch.randint(0, 7, batch.attention_mask.shape, device=device)
    outside = prefix_concat(batch.prompts, embedding[ids], batch.attention_mask, prompt_index=batch.prompt_index)
    ids = ids.masked_fill(batch.attention_mask == 0, -100)
    for given in (ids, ids.int()):
        inside = prefix_concat(
            batch.prompts,
            None,
            batch.attention_mask,
            input_ids=given,
            embedding=gapped(embedding),
            prompt_index=batch.prompt_index,
        )
        assert_same(inside, outside)
    dout = torch.randn_like(outside.embeds)
    for inner, outer in zip(
        gradients(inside.embeds, batch.prompts, dout), gradients(outside.embeds, batch.prompts, dout), strict=True
    ):
        assert torch.equal(inner, outer)


@pytest.mark.parametrize("mask", ["left", "right", "both sides, row by row", "holes, left", "an empty row"])
def test_each_row_is_that_row_alone(device: str, implementation: str, mask: str) -> None:
    batch = make_batch(MASKS[mask], device=device)
    together = prefix_concat(*batch[:3], prompt_index=batch.prompt_index)
    for b, row in enumerate(batch.attention_mask != 0):
        embeds = batch.embeds[b : b + 1, row]
        alone = prefix_concat(
            [batch.prompts[int(batch.prompt_index[b])]],
            embeds,
            torch.ones(1, embeds.shape[1], dtype=torch.int64, device=device),
        )
        kept = together.attention_mask[b] != 0
        for name in ("embeds", "attention_mask", "position_ids"):
            assert torch.equal(getattr(together, name)[b, kept], getattr(alone, name)[0]), name


@pytest.mark.parametrize("mask", [["0011", "1111", "0001"], ["1100", "1111", "1000"]], ids=["left", "right"])
def test_llama_gives_each_row_its_own_logits(device: str, implementation: str, mask: list[str]) -> None:
    """Through a causal model a padded batch gives each row's tokens the logits that the row has alone, without padding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=31,
    )
    model = LlamaForCausalLM(config).to(device).eval()
    batch = make_batch(mask, D=16, device=device)
    with torch.no_grad():
        together = prefix_concat(*batch[:3], prompt_index=batch.prompt_index)
        logits = model(
            inputs_embeds=together.embeds, attention_mask=together.attention_mask, position_ids=together.position_ids
        ).logits
        for b, row in enumerate(batch.attention_mask != 0):
            alone = torch.cat((batch.prompts[int(batch.prompt_index[b])], batch.embeds[b, row]))[None]
            eager = model(inputs_embeds=alone).logits[0]
            exact = model.double()(inputs_embeds=alone.double()).logits[0]
            model.float()
            assert_within_bound(f"row {b}", logits[b, together.attention_mask[b] != 0], eager, exact)


def raw_arguments(device: str = "cpu") -> dict[str, Any]:
    """What the operator itself takes, by name and in order: three prompts of 2, 3 and 1 rows before 2 rows of 4 tokens."""
    batch = make_batch(["0011", "1111"], device=device)
    return {
        "prompts": torch.cat(batch.prompts).detach(),
        "starts": torch.tensor([0, 2, 5, 6], device=device),
        "max_prompt": 3,
        "prompt_index": batch.prompt_index,
        "embeds": batch.embeds.detach().nan_to_num(),
        "input_ids": None,
        "embedding": None,
        "attention_mask": batch.attention_mask,
        "position_ids": torch.arange(4, device=device).repeat(2, 1),
        "labels": torch.ones(2, 4, dtype=torch.int64, device=device),
    }


def with_ids(arguments: dict[str, Any]) -> dict[str, Any]:
    device = arguments["prompts"].device
    ids = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 0]], device=device)
    return {**arguments, "embeds": None, "input_ids": ids, "embedding": torch.randn(7, 5, device=device)}


@pytest.mark.parametrize("wrong", [-1, 3, 2**62], ids=str)
def test_numbers_that_do_not_exist(device: str, implementation: str, wrong: int) -> None:
    """Where they cannot be read back their rows are NaN; an implementation that can read them may raise. Never another row's values."""
    run = ops.implementation("prefix_concat", implementation)
    arguments = raw_arguments(device)
    right = run(*arguments.values())[0]
    try:
        out = run(*{**arguments, "prompt_index": torch.tensor([wrong, 2], device=device)}.values())[0]
    except RuntimeError as error:
        assert device == "cpu" and "prompt_index" in str(error)
    else:
        assert torch.equal(out[1], right[1])
        assert out[0].isnan().any() and not torch.isin(out[0], arguments["prompts"]).any()
    wrong_id = 7 if wrong == 3 else wrong
    arguments = with_ids(arguments)
    right = run(*arguments.values())[0]
    arguments["input_ids"][1, 2] = wrong_id
    try:
        out = run(*arguments.values())[0]
    except RuntimeError as error:
        assert device == "cpu" and "input_ids" in str(error)
    else:
        bad = out.isnan().all(-1)
        assert bad.sum() == 1 and bad[1].any() and torch.equal(out[~bad], right[~bad])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: only there a number is not read back")
def test_prompt_index_out_of_range_on_a_gpu() -> None:
    """No sync: the row's prompt becomes NaN, and a later check raises."""
    batch = make_batch(["0011", "1111"], device="cuda")
    out = prefix_concat(*batch[:3], prompt_index=torch.tensor([3, 0], device="cuda")).embeds
    assert out[0].isnan().any() and out[1].isfinite().all()
    torch.cuda.synchronize()
    with pytest.raises(IndexError, match="^prompt_index: expected numbers from 0 to 2"):
        raise_pending()


def test_two_runs_are_equal(device: str, implementation: str) -> None:
    torch.use_deterministic_algorithms(False)  # the tests' own setting must not be what makes it so
    batch = make_batch(["01111", "11111", "00111"] * 4, (4, 2), 9, device=device)
    runs = []
    dout = torch.randn(12, 9, 9, device=device)
    for _ in range(2):
        out = prefix_concat(*batch[:3], prompt_index=batch.prompt_index).embeds
        runs.append([out, *gradients(out, (batch.embeds, *batch.prompts), dout)])
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_only_what_is_needed(device: str, implementation: str) -> None:
    arguments = raw_arguments(device)
    source = ops.implementation("prefix_concat", implementation)(*arguments.values())[4]
    dout = torch.randn(2, 7, 5, device=device)
    backward = ops.implementation("prefix_concat_backward", implementation)
    dprompts, dembeds = backward(dout, source, 6, 4, True, True)
    assert dprompts.shape == (6, 5) and dembeds.shape == (2, 4, 5)
    only, nothing = backward(dout, source, 6, 4, True, False)
    assert torch.equal(only, dprompts) and nothing.numel() == 0
    nothing, only = backward(dout, source, 6, 4, False, True)
    assert torch.equal(only, dembeds) and nothing.numel() == 0


def test_without_gradients(device: str, implementation: str) -> None:
    batch = make_batch(["0011", "1111"], device=device)
    with_grad = prefix_concat(*batch[:3], prompt_index=batch.prompt_index)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            result = prefix_concat(*batch[:3], prompt_index=batch.prompt_index)
        assert not result.embeds.requires_grad
        assert_same(result, with_grad)


def test_gradients_where_only_some_are_wanted(device: str, implementation: str) -> None:
    batch = make_batch(["0011", "1111"], device=device)
    full = prefix_concat(*batch[:3], prompt_index=batch.prompt_index)
    dout = torch.randn_like(full.embeds)
    dembeds, *dprompts = gradients(full.embeds, (batch.embeds, *batch.prompts), dout)
    frozen = [one.detach() for one in (batch.embeds, *batch.prompts)]
    for prompts, embeds, leaves, wanted in (
        (batch.prompts, frozen[0], batch.prompts, dprompts),
        (frozen[1:], batch.embeds, [batch.embeds], [dembeds]),
    ):
        some = prefix_concat(prompts, embeds, batch.attention_mask, prompt_index=batch.prompt_index)
        for grad, want in zip(gradients(some.embeds, leaves, dout), wanted, strict=True):
            assert torch.equal(grad, want)


def test_only_the_embeddings_are_differentiated(device: str, implementation: str) -> None:
    """Of the results: neither a mask of floats, nor what has no gradient to give back."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> None:
            return None

    batch = make_batch(["0011", "1111"], device=device)
    result = prefix_concat(batch.prompts, batch.embeds, batch.attention_mask.float(), prompt_index=batch.prompt_index)
    assert result.embeds.requires_grad and not result.attention_mask.requires_grad
    Stop.apply(result.embeds).nan_to_num().sum().backward()
    assert all(one.grad is None for one in (batch.embeds, *batch.prompts))


def test_gradcheck(device: str) -> None:
    batch = make_batch(["0110", "1111", "0000", "0111"], dtype=torch.float64, device=device)
    embeds = batch.embeds.detach().nan_to_num().requires_grad_()

    def function(embeds: Tensor, *prompts: Tensor) -> Tensor:
        return prefix_concat(prompts, embeds, batch.attention_mask, prompt_index=batch.prompt_index).embeds

    assert torch.autograd.gradcheck(function, (embeds, *batch.prompts))


def test_on_meta() -> None:
    """Shapes and dtypes without memory, gradients too."""
    prompts = [torch.ones(length, 5, device="meta", requires_grad=True) for length in (2, 3)]
    embeds = torch.ones(2, 4, 5, device="meta", dtype=torch.bfloat16, requires_grad=True)
    mask, index = torch.ones(2, 4, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")
    result = prefix_concat(prompts, embeds, mask, prompt_index=index)
    assert result.embeds.is_meta and result.embeds.shape == (2, 7, 5) and result.embeds.dtype == torch.bfloat16
    assert result.attention_mask.shape == result.position_ids.shape == (2, 7) and result.labels is None
    for leaf, grad in zip(
        (embeds, *prompts), gradients(result.embeds, (embeds, *prompts), result.embeds.detach()), strict=True
    ):
        assert grad.is_meta and grad.shape == leaf.shape and grad.dtype == leaf.dtype


def test_opcheck(device: str) -> None:
    arguments = raw_arguments(device)
    for given in (arguments, {**arguments, "position_ids": None, "labels": None}, with_ids(arguments)):
        torch.library.opcheck(torch.ops.fastlora.prefix_concat.default, tuple(given.values()))
    source = torch.ops.fastlora.prefix_concat(*arguments.values())[4]
    for need in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            torch.ops.fastlora.prefix_concat_backward.default,
            (torch.randn(2, 7, 5, device=device), source, 6, 4, *need),
        )


@pytest.mark.parametrize("stacked", [True, False], ids=["tensor", "list"])
def test_compiles_whole(device: str, stacked: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(prefix_concat, fullgraph=True, backend="aot_eager", dynamic=True)
    for mask in (["0011", "1111"], ["00111", "11111", "00001"]):
        batch = make_batch(mask, (2, 2), device=device)
        prompts = torch.stack(batch.prompts).detach().requires_grad_() if stacked else batch.prompts
        leaves = [batch.embeds, *([prompts] if stacked else prompts)]
        options = {
            "prompt_index": batch.prompt_index,
            "labels": torch.randint_like(batch.attention_mask, 9),
            "position_ids": torch.randint_like(batch.attention_mask, 9),
        }
        got, expected = (function(prompts, *batch[1:3], **options) for function in (compiled, prefix_concat))
        assert_same(got, expected)
        dout = torch.randn_like(expected.embeds)
        for grad, want in zip(
            gradients(got.embeds, leaves, dout), gradients(expected.embeds, leaves, dout), strict=True
        ):
            assert torch.equal(grad, want)


def test_compiles_with_labels_that_are_the_ids(device: str) -> None:
    """A causal model's labels are often its input_ids, the very same tensor."""
    torch.compiler.reset()
    compiled = torch.compile(prefix_concat, fullgraph=True, backend="aot_eager")
    prompts, embedding = torch.randn(1, 2, 5, device=device, requires_grad=True), torch.randn(7, 5, device=device)
    ids = torch.randint(0, 7, (2, 4), device=device)
    options = {"input_ids": ids, "embedding": embedding, "labels": ids}
    got, expected = (function(prompts, None, torch.ones_like(ids), **options) for function in (compiled, prefix_concat))
    assert_same(got, expected)
