"""A DoRA layer that runs without gradients keeps its norms from call to call, and computes them anew as soon as W, s, A or B is written to."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import peft
import pytest
import quantised_weights
import torch
from bounds import gapped
from torch import Tensor, nn

import fastlora
from fastlora import ops
from fastlora.frozen.quantised import QuantisedWeight
from fastlora.operators import dora_factor
from fastlora.peft import known

K, N = 40, 24
X = torch.randn(2, K, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.skipif(
    known.unchanged is None or dora_factor._fingerprint is None, reason="needs the native extension"
)


def layer_of(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, target_modules=["0"], init_lora_weights=False, use_dora=True)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)).to(dtype), config)
    return fastlora.accelerate(model).base_model.model[0].eval()


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for every time that norms were computed."""
    calls, compute = [], dora_factor.compute
    monkeypatch.setattr(dora_factor, "compute", lambda *given: calls.append(len(calls)) or compute(*given))
    return calls


@torch.no_grad()
def answer(layer: Any, x: Tensor = X) -> Tensor:
    return layer(x.to(layer.base_layer.weight.dtype))


@torch.no_grad()
def anew(layer: Any) -> Tensor:
    """As a layer gives it that knows nothing."""
    other = copy.deepcopy(layer)
    assert known.ACTIVE not in other.__dict__
    return answer(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_are_computed_once_and_give_the_same_bits(computed: list[int], dtype: torch.dtype) -> None:
    layer = layer_of(dtype)
    first = answer(layer)
    assert all(torch.equal(answer(layer), first) for _ in range(3)) and len(computed) == 1
    with torch.inference_mode():
        assert torch.equal(layer(X.to(dtype)), first) and len(computed) == 1
    assert torch.equal(anew(layer), first)


def matrix(layer: Any, which: str) -> Tensor:
    return {
        "A": layer.lora_A["default"].weight,
        "B": layer.lora_B["default"].weight,
        "W": layer.base_layer.weight,
    }[which]


def unseen(weight: Tensor) -> int:
    """An element that the fingerprint of some does not read."""
    seen = dora_factor._fingerprint(weight)
    for number in range(weight.numel()):
        other = weight.detach().clone()
        other.view(-1)[number] += 1
        if dora_factor._fingerprint(other) == seen:
            return number
    raise AssertionError("it reads all of them")


def step(layer: Any, which: str, **options: Any) -> None:
    """Of an optimiser, in one element."""
    weight = matrix(layer, which)
    flat = nn.Parameter(weight.data.view(-1))  # another parameter over the memory: no version of the weight's counts
    flat.grad = torch.zeros_like(flat)
    flat.grad[unseen(weight) if which == "W" else 5] = 10.0
    torch.optim.SGD([flat], lr=1.0, **options).step()


def load(layer: Any, **options: Any) -> None:
    layer.load_state_dict({name: 1.5 * value for name, value in layer.state_dict().items()}, **options)


def merge_and_unmerge(layer: Any) -> None:
    layer.merge()
    layer.unmerge()


WRITES: dict[str, Callable[[Any], Any]] = {
    **{f"a step over {one}": lambda layer, one=one: step(layer, one) for one in "ABW"},
    **{f"a fused step over {one}": lambda layer, one=one: step(layer, one, fused=True) for one in "ABW"},
    **{f"an element of {one}, .data": lambda layer, one=one: matrix(layer, one).data[1].view(-1)[7 if one == "A" else 2].add_(3) for one in "AB"},
    **{f"an element of {one}, numpy": lambda layer, one=one: matrix(layer, one).detach().numpy().__setitem__((2, 1), 5.0) for one in "AB"},
    **{f"all of {one}, .data": lambda layer, one=one: matrix(layer, one).data.mul_(1.5) for one in "ABW"},
    **{f"other memory for {one}": lambda layer, one=one: setattr(matrix(layer, one), "data", matrix(layer, one) * 2) for one in "ABW"},
    "an element of W, counted": lambda layer: matrix(layer, "W").data_ptr() and matrix(layer, "W")[3, unseen(matrix(layer, "W")) % K].fill_(9),
    "load_state_dict": load,
    "load_state_dict, assign": lambda layer: load(layer, assign=True),
    "the scale": lambda layer: layer.set_scale("default", 3.0),
    "the magnitude": lambda layer: layer.lora_magnitude_vector["default"].weight.data[2:3].mul_(2),
}  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
def test_a_write_is_seen(write: str) -> None:
    layer = layer_of()
    before = answer(layer)
    assert torch.equal(answer(layer), before)
    with torch.no_grad():
        WRITES[write](layer)
    assert not torch.equal(anew(layer), before)
    assert torch.equal(answer(layer), anew(layer)) and torch.equal(answer(layer), anew(layer))


def test_a_merge_in_between_is_seen(computed: list[int]) -> None:
    """Unmerged W is W to some bits, of which no fingerprint need read any."""
    layer = layer_of()
    answer(layer)
    merge_and_unmerge(layer)
    count = len(computed)
    assert torch.equal(answer(layer), anew(layer)) and len(computed) == count + 2


def test_training_goes_on_after_an_answer(computed: list[int]) -> None:
    """What is kept, of inference mode as well, is nothing for a graph; and between two steps nothing is kept."""
    layer, peer = layer_of(), layer_of()
    with torch.inference_mode():
        layer(X)
    for each in (layer, peer):
        each.train()
        for _ in range(2):
            each(X).sum().backward()
    assert len(computed) == 5
    for one, other in zip(layer.parameters(), peer.parameters(), strict=True):
        assert (one.grad is None and other.grad is None) or torch.equal(one.grad, other.grad)


def test_weights_of_inference_mode_tell_nothing_and_nothing_is_kept(computed: list[int]) -> None:
    layer = layer_of()
    with torch.inference_mode():
        layer.double().float()
        for _ in range(2):
            assert torch.equal(layer(X), anew(layer))
            layer.lora_A["default"].weight.mul_(2)
    assert len(computed) == 4


def test_what_is_kept_goes_with_what_the_layer_knows() -> None:
    layer = layer_of()
    answer(layer)
    kept = layer.__dict__[known.ACTIVE].plan.norm[0]
    norm = weakref.ref(kept.found[1])
    del kept
    assert layer.__getstate__().keys().isdisjoint({known.ACTIVE}) and norm() is not None
    known.forget(layer)
    gc.collect()
    assert norm() is None


@pytest.mark.parametrize("kind", quantised_weights.KINDS)
def test_of_a_quantised_weight_they_are_kept_until_it_is_written_to(kind: str, computed: list[int]) -> None:
    """Past any count, in its elements or in any of their factors; and each dtype of x has its own, as W is rounded to it."""
    stored = quantised_weights.stored(kind, N, K)
    weight, wide = (QuantisedWeight(stored, kind, dtype, dtype) for dtype in (torch.bfloat16, torch.float32))
    given = torch.rand(N), weight, torch.randn(3, K), torch.randn(N, 3), 0.5
    kept = dora_factor.KeptNorm()

    @torch.no_grad()
    def factor(of: Any = given) -> Tensor:
        return dora_factor.apply_kept(kept, *of)

    def expected() -> Tensor:
        return dora_factor.run(*given)[0]

    first = factor()
    assert torch.equal(factor(), first) and torch.equal(first, expected()) and len(computed) == 1
    assert not torch.equal(factor((given[0], wide, *given[2:])), first) and len(computed) == 2
    factor()
    for part in (one for one in stored if isinstance(one, Tensor)):
        before, count = factor(), len(computed)
        part.data.add_(1)
        assert torch.equal(factor(), expected()) and len(computed) == count + 1
        assert not torch.equal(expected(), before)


@pytest.mark.parametrize("without", ["the extension", "float32 or less"])
def test_elsewhere_nothing_is_kept(without: str, computed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of(torch.float64 if without != "the extension" else torch.float32)
    if without == "the extension":
        monkeypatch.setattr(dora_factor, "_fingerprint", None)
    first = answer(layer)
    assert torch.equal(answer(layer), first) and len(computed) == 2


def test_another_implementation_computes_anew(computed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of()
    first = answer(layer)
    monkeypatch.setattr(ops, "forced", "reference")
    assert torch.allclose(answer(layer), first, atol=1e-5) and len(computed) == 2


def test_compiles_whole_without_gradients() -> None:
    torch.compiler.reset()
    layer = layer_of()
    expected = answer(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(X), expected, atol=1e-5)
        layer.lora_A["default"].weight.data.mul_(2)
        assert torch.allclose(compiled(X), anew(layer), atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [lambda one: one, gapped, lambda one: one.t().contiguous().t()], ids=["dense", "gaps", "by column"])  # fmt: skip
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 24), (7, 67)], ids=str)
def test_the_fingerprint_of_a_whole_matrix_reads_every_element(
    shape: tuple[int, int], layout: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> None:
    weight = layout(torch.randn(shape).to(dtype))
    first, found = dora_factor._fingerprint(weight, True), set()
    assert dora_factor._fingerprint(weight.clone(), True) == first
    for row in range(shape[0]):
        for column in range(shape[1]):
            before = weight[row, column].clone()
            weight[row, column] += 1
            found.add(dora_factor._fingerprint(weight, True))
            weight[row, column] = before
    assert first not in found and len(found) == weight.numel() and dora_factor._fingerprint(weight, True) == first
