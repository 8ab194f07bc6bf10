"""peft/quantised.py, a layer at a time: what is read of a quantised weight, when it is read again, and what is left to its library. The libraries'
classes have stand-ins here; test_quantised_models.py has the real ones.
"""

import sys
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantised_weights import CODE
from torch import Tensor, nn

from fastlora import ops
from fastlora.frozen import quantised as products
from fastlora.frozen.quantised import QuantisedWeight
from fastlora.peft import quantised
from fastlora.peft.quantised import Base, Source

N, K = 6, 8


class Four(nn.Linear):
    """bitsandbytes' Linear4bit."""

    compute_dtype: Any = torch.bfloat16
    compute_type_is_set = False

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("the layer's own forward")


class Eight(nn.Linear):
    """bitsandbytes' Linear8bitLt."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("the layer's own forward")


class Int8Tensor(nn.Parameter):
    """torchao's."""


Int8Tensor.__module__ = "torchao.quantization"


@pytest.fixture(autouse=True)
def libraries(monkeypatch: pytest.MonkeyPatch) -> Any:
    library = SimpleNamespace(nn=SimpleNamespace(Linear4bit=Four, Linear8bitLt=Eight))
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    monkeypatch.setattr(ops, "forced", None)
    return library


def state_of(nested: bool) -> Any:
    factor = torch.rand(1)
    state = SimpleNamespace(
        shape=torch.Size([N, K]), absmax=factor, code=CODE, blocksize=64, quant_type="nf4", nested=nested
    )
    if nested:
        state.absmax, state.offset = torch.tensor([3], dtype=torch.uint8), torch.tensor(0.5)
        state.state2 = SimpleNamespace(absmax=factor, code=torch.randn(256), blocksize=256)
    return state


def four_bits(nested: bool = False, bias: bool = True) -> Any:
    layer = Four(K, N, bias=bias).requires_grad_(False)
    layer.weight = nn.Parameter(torch.randint(0, 256, (N * K // 2, 1), dtype=torch.uint8), requires_grad=False)
    layer.weight.quant_state = state_of(nested)
    return layer


def int8(on_weight: bool = True) -> Any:
    layer = Eight(K, N).requires_grad_(False)
    elements = torch.randint(-127, 128, (N, K), dtype=torch.int8)
    layer.weight = nn.Parameter(elements, requires_grad=False)
    layer.state = SimpleNamespace(has_fp16_weights=False, CB=None, SCB=None)
    owner = layer.weight if on_weight else layer.state
    layer.weight.CB = layer.weight.SCB = None
    owner.CB, owner.SCB = elements, torch.rand(N)
    return layer


def torchao(block: tuple[int, int] = (1, K), factors: int = N) -> Any:
    layer = nn.Linear(K, N).requires_grad_(False)
    weight = Int8Tensor(torch.zeros(N, K), requires_grad=False)
    weight.qdata, weight.scale = torch.randint(-127, 128, (N, K), dtype=torch.int8), torch.rand(factors, 1)
    weight.zero_point = weight.act_quant_kwargs = weight.act_pre_scale = None
    weight.block_size = block
    layer.weight = weight
    return layer


MAKE = {"four bits": four_bits, "int8": int8, "torchao": torchao}
EACH = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def weight_of(layer: Any, dtype: torch.dtype | None = torch.float32) -> QuantisedWeight:
    base = quantised.base_of(layer)
    assert isinstance(base, Base), base
    return base.weight(dtype)


@EACH
def test_the_same_weight_as_long_as_its_layer_is_as_it_was(make: Any) -> None:
    layer = make()
    base = quantised.base_of(layer)
    assert base is quantised.base_of(layer) and base.weight(torch.float32) is base.weight(torch.float32)
    assert base.weight() is base.weight(torch.float32)
    for dtype in (torch.bfloat16, torch.float64):
        assert base.weight(dtype).dtype is base.weight(dtype).compute is dtype
    gone = weakref.ref(base)
    del layer, base
    assert gone() is None


@EACH
def test_what_stands_in_every_ones_way(make: Any) -> None:
    layer = make()
    layer.bias.requires_grad_()
    assert quantised.base_of(layer) == "the base weight or bias is trained"
    layer.bias = None
    assert isinstance(quantised.base_of(layer), Base)
    assert quantised.base_of(nn.Linear(K, N)) is None and quantised.base_of(nn.Bilinear(1, 1, 1)) is None
    trained = torchao()
    trained.weight.requires_grad_()
    assert quantised.base_of(trained) == "the base weight or bias is trained"


def test_weights_on_other_devices_are_left_to_the_library() -> None:
    layer = four_bits()
    layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)
    assert quantised.base_of(layer) == "the weight is quantised, and on meta"


def test_a_library_that_nobody_has_imported_is_asked_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    assert quantised.base_of(four_bits()) is None and quantised.base_of(int8()) is None
    assert isinstance(quantised.base_of(torchao()), Base)


CHANGES: dict[str, tuple[Any, Any]] = {
    "four bits, the weight": (
        four_bits,
        lambda layer: setattr(layer.weight, "data", layer.weight.data.clone()),
    ),
    "four bits, factors": (four_bits, lambda layer: setattr(layer.weight.quant_state, "absmax", torch.rand(1))),
    "four bits, code": (four_bits, lambda layer: setattr(layer.weight.quant_state, "code", CODE.clone())),
    "four bits, dtype": (four_bits, lambda layer: setattr(layer, "compute_type_is_set", True)),
    **{
        f"four bits, double, {name}": (
            lambda: four_bits(nested=True),
            lambda layer, name=name: setattr(
                layer.weight.quant_state.state2, name, getattr(layer.weight.quant_state.state2, name).clone()
            ),
        )
        for name in ("absmax", "code")
    },
    "four bits, double, offset": (
        lambda: four_bits(nested=True),
        lambda layer: setattr(layer.weight.quant_state, "offset", torch.tensor(0.25)),
    ),
    "int8, elements": (int8, lambda layer: setattr(layer.weight, "CB", layer.weight.CB.clone())),
    "int8, factors": (int8, lambda layer: setattr(layer.weight, "SCB", torch.rand(N))),
    "int8, factors in place": (int8, lambda layer: layer.weight.SCB.mul_(2)),
    "int8, mode": (int8, lambda layer: layer.eval()),
    "torchao, elements": (torchao, lambda layer: setattr(layer.weight, "qdata", layer.weight.qdata.clone())),
    "torchao, factors": (torchao, lambda layer: setattr(layer.weight, "scale", torch.rand(N, 1))),
    "torchao, factors in place": (torchao, lambda layer: layer.weight.scale.mul_(2)),
    "torchao, zero points": (
        torchao,
        lambda layer: setattr(layer.weight, "zero_point", torch.zeros(N, 1, dtype=torch.int8)),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_read_anew(change: str) -> None:
    make, do = CHANGES[change]
    layer = make()
    before = quantised.base_of(layer)
    assert isinstance(before, Base)
    do(layer)
    after = quantised.base_of(layer)
    assert isinstance(after, Base) and after is not before and after is quantised.base_of(layer)


def test_sources_are_the_same_by_their_objects_and_numbers() -> None:
    one, other = torch.ones(2), torch.ones(2)
    assert Source((one,), (1, 2)).is_as(Source((one,), (1, 2)))
    assert not Source((one,), (1, 2)).is_as(Source((other,), (1, 2)))
    assert not Source((one,), (1, 2)).is_as(Source((one,), (1, 3)))


@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_are_read(nested: bool) -> None:
    layer = four_bits(nested)
    state, weight = layer.weight.quant_state, weight_of(layer)
    assert weight.title == "NF4" and weight.own_product is None and weight.shape == (N, K)
    made = weight.stored
    assert type(made.packed) is Tensor and made.packed.data_ptr() == layer.weight.data_ptr()
    assert made.packed.dtype is torch.uint8 and made.code is state.code
    assert (made.block, made.rows, made.columns) == (64, N, K)
    if nested:
        assert made.factor is state.state2.absmax and made.factor_codes is state.absmax
        assert made.factor_code is state.state2.code and (made.factor_offset, made.factor_block) == (0.5, 256)
    else:
        assert made.factor is state.absmax and made.factor_codes is made.factor_code is None
        assert (made.factor_offset, made.factor_block) == (0.0, 1)
    layer.compute_type_is_set = True
    assert weight_of(layer).compute is torch.bfloat16 and weight_of(layer).dtype is torch.float32
    assert weight_of(layer, None).dtype is torch.bfloat16


def test_what_stands_in_the_way_of_four_bits() -> None:
    layer = four_bits()
    layer.weight.quant_state.packing_format_for_cpu = True
    assert quantised.base_of(layer) == "bitsandbytes has packed the weight for its own inference"
    layer.weight.quant_state = None
    assert quantised.base_of(layer) == "the weight has not been quantised yet"
    del layer.weight.quant_state
    assert quantised.base_of(layer) == "the weight has not been quantised yet"
    for shape in ([K, N], [N, K + 1]):
        layer.weight.quant_state = state_of(False)
        layer.weight.quant_state.shape = torch.Size(shape)
        assert quantised.base_of(layer) == f"the weight was quantised as {shape}"
    odd = four_bits()
    odd.in_features, odd.weight.quant_state.shape = 7, torch.Size([N, 7])
    assert quantised.base_of(odd) == "the weight was quantised as [6, 7]"  # a byte would have two rows
    for nested, dtype in ((False, torch.uint8), (True, torch.float32)):
        layer = four_bits(nested)
        layer.weight.quant_state.absmax = layer.weight.quant_state.absmax.to(dtype)
        assert quantised.base_of(layer) == f"the weight's factors are {dtype}"


def test_what_is_left_to_a_library_is_asked_again() -> None:
    layer = four_bits()
    right = layer.weight.quant_state.shape
    layer.weight.quant_state.shape = torch.Size([K, N])
    assert isinstance(quantised.base_of(layer), str)
    layer.weight.quant_state.shape = right
    assert isinstance(quantised.base_of(layer), Base)


@pytest.mark.parametrize("packs", [True, False, None])
def test_a_weight_is_held_as_it_is(packs: bool | None) -> None:
    layer = four_bits()
    if packs is not None:
        layer.support_avx512bf16_for_cpu = packs
    before = dict(vars(layer))
    for _ in range(2):
        quantised.hold(layer)
    assert not getattr(layer, "support_avx512bf16_for_cpu", False)
    assert packs or dict(vars(layer)) == before
    for _ in range(2):
        quantised.release(layer)
    assert dict(vars(layer)) == before


@pytest.mark.parametrize("on_weight", [True, False], ids=["weight", "state"])
def test_int8_is_read(on_weight: bool, libraries: Any) -> None:
    """Before the layer's first call the weight has what the state has afterwards."""
    layer = int8(on_weight)
    owner = layer.weight if on_weight else layer.state
    made = weight_of(layer).stored
    assert made.packed.data_ptr() == owner.CB.data_ptr() and type(made.packed) is Tensor
    assert torch.equal(made.factor, owner.SCB * (1.0 / 127.0))
    assert made.code is made.factor_codes is made.factor_code is None
    assert (made.factor_offset, made.block, made.factor_block, made.rows, made.columns) == (0.0, K, 1, N, K)
    assert weight_of(layer).title == "int8" and weight_of(layer).own_product is None
    own = weight_of(layer.eval()).own_product
    asked: list[Any] = []
    layer.init_8bit_state = lambda: asked.append("init")

    def matmul(x: Tensor, weight: Tensor, bias: Tensor | None, state: Any) -> Tensor:
        asked.append((x, weight, bias, state))
        return x

    libraries.matmul = matmul
    x, bias = torch.ones(2, K).bfloat16(), torch.ones(N)
    assert own(x, bias) is x and layer.state.is_training is False
    *before, (given, weight, cast, state) = asked
    assert before == ["init"] * on_weight
    assert given is x and weight is layer.weight and state is layer.state and cast.dtype is torch.bfloat16
    own(x, None)
    assert asked[-1][2] is None


def test_what_stands_in_the_way_of_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CB", "SCB"):
        layer = int8()
        setattr(layer.weight, name, None)
        assert quantised.base_of(layer) == "the weight has not been quantised yet"
    layer = int8()
    layer.weight.CB, layer.state.SCB = None, torch.rand(N)
    assert quantised.base_of(layer) == "the weight has not been quantised yet"
    layer = int8()
    layer.state.has_fp16_weights = True
    assert quantised.base_of(layer) == "bitsandbytes quantises the weight in every call"
    layer = int8()
    for patched, name, value in ((ops, "forced", "reference"), (products, "_dequantise", None)):
        with monkeypatch.context() as patch:
            patch.setattr(patched, name, value)
            assert isinstance(quantised.base_of(layer.train()), Base)
            assert quantised.base_of(layer.eval()) == "bitsandbytes multiplies in eval mode"
    assert isinstance(quantised.base_of(layer), Base)


@pytest.mark.parametrize(("block", "factors"), [((1, K), N), ((1, 4), 2 * N), ((N, K), 1)], ids=str)
def test_torchao_is_read(block: tuple[int, int], factors: int) -> None:
    """A factor a row, a part of it, or the whole weight."""
    layer = torchao(block, factors)
    layer.weight.scale = layer.weight.scale.bfloat16()
    weight = weight_of(layer)
    assert weight.title == "torchao int8" and weight.own_product is None
    made = weight.stored
    assert torch.equal(made.packed, layer.weight.qdata) and made.block == block[0] * block[1]
    assert made.factor.dtype is torch.float32 and made.factor.shape == (factors,)
    expected = layer.weight.qdata * layer.weight.scale.float().flatten().repeat_interleave(made.block).view(N, K)
    assert torch.equal(weight + 0, expected)
    across = torchao()
    across.weight.qdata = across.weight.qdata.t().contiguous().t()
    assert weight_of(across).stored.packed.is_contiguous()


def test_what_stands_in_the_way_of_torchao() -> None:
    layer = torchao()
    for name in ("act_quant_kwargs", "act_pre_scale"):
        setattr(layer.weight, name, torch.ones(K))
        assert quantised.base_of(layer) == "torchao quantises or scales x"
        setattr(layer.weight, name, None)
    layer.weight.zero_point = torch.zeros(N, 1, dtype=torch.int8)
    assert isinstance(quantised.base_of(layer), Base)
    layer.weight.zero_point = torch.ones(N, 1, dtype=torch.int8)
    assert quantised.base_of(layer) == "the weight has zero points"
    for down, right in ((2, K), (1, 3), (N, 4), (2, 4)):
        assert quantised.base_of(torchao((down, right))) == f"the weight has blocks of {down} x {right}"

    class Other(nn.Parameter):
        __module__ = "torchao.other"

    layer.weight = Other(torch.zeros(N, K), requires_grad=False)
    assert quantised.base_of(layer) == "the weight is a Other"
    Other.__name__ = "Int4OpaqueTensor"
    told = "torchao has packed its int4 weight for a kernel of torch's, which has no gradient"
    assert quantised.base_of(layer) == told
    layer = torchao()
    layer.__class__ = Doubled
    assert quantised.base_of(layer) is None


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)
