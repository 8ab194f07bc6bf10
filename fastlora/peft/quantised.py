"""The weight of a quantised layer as the operators take it, or what stands in the way: bitsandbytes' 4 bits and int8, torchao's int8 weights.

What is computed is what the layer itself would compute, up to rounding: in its compute dtype, if it has one. bitsandbytes quantises x, too, in an
int8 layer that is in eval mode, and keeps its columns with outliers apart (Dettmers et al. 2022, LLM.int8()): that product is left to it. Neither
library is imported here: who has such a layer has imported it.
"""

import operator
import sys
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastlora import ops
from fastlora.frozen import quantised
from fastlora.frozen.quantised import QuantisedWeight, Stored
from fastlora.swap import plain_of


class Source(NamedTuple):
    """What a layer's weight is read from: as long as it is this, the weight is the same."""

    objects: tuple[Any, ...]
    numbers: tuple[Any, ...]

    def is_as(self, other: "Source") -> bool:
        return self.numbers == other.numbers and all(map(operator.is_, self.objects, other.objects))


class Base:
    """A quantised layer's weight."""

    def __init__(
        self, source: Source, stored: Stored, title: str, compute: torch.dtype | None, own_product: Any = None
    ) -> None:
        """compute: None: x's dtype. own_product: as QuantisedWeight has it."""
        self.source, self.stored, self.title = source, stored, title
        self._compute, self._own_product = compute, own_product
        self._weights: dict[torch.dtype, QuantisedWeight] = {}

    def weight(self, dtype: torch.dtype | None = None) -> QuantisedWeight:
        """For an x of that dtype, the same one every time. None: of any, the one that the product is computed in."""
        dtype = dtype or self._compute or torch.float32
        found = self._weights.get(dtype)
        if found is None:
            made = QuantisedWeight(self.stored, self.title, dtype, self._compute or dtype, self._own_product)
            found = self._weights[dtype] = made
        return found


_bases: "weakref.WeakKeyDictionary[nn.Module, Base]" = weakref.WeakKeyDictionary()
"""By layer, and outside of it: no copy, pickle or state dict of a model sees them."""


def base_of(layer: Any) -> Base | str | None:
    """The weight of a quantised layer, or the words why its product is not ours; None for a layer that is none of these."""
    kind = _kind_of(layer)
    if kind is None:
        return None
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return "the base weight or bias is trained"
    if weight.device.type != "cpu":
        return f"the weight is quantised, and on {weight.device.type}"
    look, read = kind
    source = look(layer, weight)
    if isinstance(source, str):
        return source
    known = _bases.get(layer)
    if known is not None and known.source.is_as(source):
        return known
    made = read(layer, weight, source)
    if isinstance(made, Base):
        _bases[layer] = made
    return made


def _kind_of(layer: Any) -> tuple[Callable[..., Source | str], Callable[..., Base | str]] | None:
    forward, bitsandbytes = getattr(plain_of(type(layer)), "forward", None), sys.modules.get("bitsandbytes")
    if bitsandbytes is not None and forward is bitsandbytes.nn.Linear4bit.forward:
        return _look_at_four_bits, _read_four_bits
    if bitsandbytes is not None and forward is bitsandbytes.nn.Linear8bitLt.forward:
        return _look_at_int8, _read_int8
    if forward is nn.Linear.forward and type(layer._parameters.get("weight")).__module__.startswith("torchao."):
        return _look_at_torchao, _read_torchao
    return None


def _plain(tensor: Tensor) -> Tensor:
    """The same memory as a plain tensor without a gradient."""
    return tensor.detach().as_subclass(Tensor)


# ---- bitsandbytes, 4 bits

_PACKS, _PACKED_BEFORE = "support_avx512bf16_for_cpu", "_fastlora_packs"


def hold(layer: Any) -> None:
    """Keep bitsandbytes from packing the weight. Its layer does so when it is first called in eval mode (adapters disabled, say): it rounds the
    factors to bfloat16, for good, and has no gradient afterwards.
    """
    if getattr(layer, _PACKS, False):
        layer.__dict__.update({_PACKS: False, _PACKED_BEFORE: True})


def release(layer: Any) -> None:
    """Undo `hold`."""
    if layer.__dict__.pop(_PACKED_BEFORE, False):
        setattr(layer, _PACKS, True)


def _look_at_four_bits(layer: Any, weight: Any) -> Source | str:
    state = getattr(weight, "quant_state", None)
    if state is None:
        return "the weight has not been quantised yet"
    if getattr(state, "packing_format_for_cpu", False):
        return "bitsandbytes has packed the weight for its own inference"
    compute = layer.compute_dtype if layer.compute_type_is_set else None
    shared = (state.offset, state.state2.absmax, state.state2.code) if state.nested else ()
    return Source((state.absmax, state.code, *shared), (weight.data_ptr(), compute))


def _read_four_bits(layer: Any, weight: Any, source: Source) -> Base | str:
    state = weight.quant_state
    if tuple(state.shape) != (layer.out_features, layer.in_features) or state.shape[1] % 2:
        return f"the weight was quantised as {list(state.shape)}"
    if state.absmax.dtype is not (torch.uint8 if state.nested else torch.float32):
        return f"the weight's factors are {state.absmax.dtype}"
    nested = state.state2 if state.nested else None
    stored = Stored(
        packed=_plain(weight).view(torch.uint8),
        code=state.code,
        factor=state.absmax if nested is None else nested.absmax,
        factor_codes=None if nested is None else state.absmax,
        factor_code=None if nested is None else nested.code,
        factor_offset=0.0 if nested is None else state.offset.item(),
        block=state.blocksize,
        factor_block=1 if nested is None else nested.blocksize,
        rows=layer.out_features,
        columns=layer.in_features,
    )
    return Base(source, stored, state.quant_type.upper(), source.numbers[1])


# ---- bitsandbytes, int8


def _look_at_int8(layer: Any, weight: Any) -> Source | str:
    state = layer.state
    if state.has_fp16_weights:
        return "bitsandbytes quantises the weight in every call"
    elements, factor = _int8_of(layer)
    if elements is None or factor is None:
        return "the weight has not been quantised yet"
    if not layer.training and (ops.forced == "reference" or not quantised.is_native()):
        return "bitsandbytes multiplies in eval mode"
    return Source((factor,), (elements.data_ptr(), factor._version, layer.training))


def _int8_of(layer: Any) -> tuple[Tensor | None, Tensor | None]:
    """The elements and the factors. PEFT's own forward of a DoRA moves the weight within the CPU, and the weight loses its factors thereby."""
    weight, state = layer.weight, layer.state
    return (state.CB if weight.CB is None else weight.CB), (state.SCB if weight.SCB is None else weight.SCB)


def _read_int8(layer: Any, weight: Any, source: Source) -> Base:
    (factor,) = source.objects
    elements: Any = _int8_of(layer)[0]
    stored = _by_row(_plain(elements), _plain(factor) * (1.0 / 127.0), layer)
    return Base(source, stored, "int8", None, None if layer.training else partial(_multiply_int8, weakref.ref(layer)))


def _by_row(elements: Tensor, factor: Tensor, layer: Any, block: int | None = None) -> Stored:
    """int8 elements, as many as a row has or `block` of them with one factor."""
    N, K = layer.out_features, layer.in_features
    return Stored(elements, None, factor.float().flatten().contiguous(), None, None, 0.0, block or K, 1, N, K)


def _multiply_int8(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:  # [M, K] -> [M, N]
    """bitsandbytes' own product in eval mode, as its layer calls it."""
    import bitsandbytes

    base = layer()
    base.state.is_training = False
    if base.weight.CB is not None:
        base.weight.CB, base.weight.SCB = _int8_of(base)
        base.init_8bit_state()
    return bitsandbytes.matmul(x, base.weight, bias=None if bias is None else bias.to(x.dtype), state=base.state)


# ---- torchao


def _look_at_torchao(layer: Any, weight: Any) -> Source | str:
    if type(weight).__name__ == "Int4OpaqueTensor":
        return "torchao has packed its int4 weight for a kernel of torch's, which has no gradient"
    if type(weight).__name__ != "Int8Tensor":
        return f"the weight is a {type(weight).__name__}"
    if weight.act_quant_kwargs is not None or weight.act_pre_scale is not None:
        return "torchao quantises or scales x"
    return Source((weight.qdata, weight.scale, weight.zero_point), (weight.scale._version,))


def _read_torchao(layer: Any, weight: Any, source: Source) -> Base | str:
    N, K = layer.out_features, layer.in_features
    down, right = weight.block_size
    if weight.zero_point is not None and weight.zero_point.count_nonzero():
        return "the weight has zero points"
    if (down, right) != (N, K) and (down != 1 or K % right):
        return f"the weight has blocks of {down} x {right}"
    return Base(source, _by_row(weight.qdata.contiguous(), weight.scale, layer, down * right), "torchao int8", None)
