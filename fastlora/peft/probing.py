"""Whether a subclass of nn.Linear with a forward of its own computes what nn.Linear does, as Falcon's. It is called to find out: no code says it."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.bounds import nearly_equal
from fastlora.checks import is_hooked

KEY = "_fastlora_probed"
"""Under which a layer's `__dict__` has the forward that was found to be nn.Linear's product."""

SCALES = 1.0, 100.0  # of the numbers: what clips or saturates shows


def is_linear(layer: nn.Module) -> bool:
    """Whether the layer was found to compute x Wᵀ + b by the forward that its class has now."""
    return KEY in layer.__dict__ and layer.__dict__[KEY] is getattr(type(layer), "forward", None)


def probe(layer: Any) -> None:
    """Find out, and remember: a few random rows, small and large, in training and eval mode, and their gradients."""
    layer.__dict__.pop(KEY, None)
    plain = isinstance(layer, nn.Linear) and layer._parameters.keys() == {"weight", "bias"}
    if not plain or layer._modules or layer._buffers or is_hooked(layer) or layer.weight.is_meta:
        return
    training = layer.training
    try:
        if all(_agrees(layer, mode, scale) for mode in (True, False) for scale in SCALES):
            layer.__dict__[KEY] = type(layer).forward
    finally:
        layer.training = training


def _agrees(layer: Any, training: bool, scale: float) -> bool:
    layer.training = training
    drawn = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 3, layer.weight.shape[1], generator=drawn) * scale).to(layer.weight)
    dy = torch.randn(2, 3, layer.weight.shape[0], generator=drawn).to(layer.weight)
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    try:
        found = _with_gradient(lambda rows: type(layer).forward(layer, rows), x, dy)
    except Exception:  # it is another's code, which may want other arguments, or another x
        return False
    expected = _with_gradient(lambda rows: F.linear(rows, weight, bias), x, dy)
    return all(map(nearly_equal, found, expected))


def _with_gradient(function: Any, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        rows = x.clone().requires_grad_()
        y = function(rows)
        (dx,) = torch.autograd.grad(y, rows, dy)
    return y.detach(), dx
