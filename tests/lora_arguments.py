"""What lora_linear takes and gives as torch calls it, without autograd: lists of layers and adapters, by the implementation of a name."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

from bounds import Layer
from torch import Tensor

from fastlora import ops
from fastlora.operators.lora_linear import CASES


def detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


class Arguments(NamedTuple):
    """Those of the operator, in its order; None stands for a bias that a layer has not."""

    x: Tensor  # [M, K]
    weight: list[Tensor]  # G of [N_g, K]
    bias: list[Tensor | None]  # G of [N_g]
    lora_a: list[Tensor]  # G S of [R_gi, K]
    lora_b: list[Tensor]  # G S of [N_g, R_gi]
    scale: list[float]  # G S
    dropout_p: list[float]  # G S
    seed: Tensor | None = None  # [G]
    order: Tensor | None = None  # [M]
    offsets: Tensor | None = None  # [S + 3]

    @property
    def case(self) -> str:
        """What this is measured and implemented as."""
        return CASES[len(self.weight) > 1, self.order is not None]

    def mapped(self, function: Callable[[Tensor | None], Tensor | None]) -> Self:
        """With a function of every tensor of floats."""
        x, *lists = self[:5]
        return Arguments(function(x), *([function(one) for one in own] for own in lists), *self[5:])

    def raw(self) -> tuple[object, ...]:
        """As torch.ops.fastlora.lora_linear takes them: no bias is one without elements."""
        bias = [self.x.new_empty(0) if one is None else one for one in self.bias]
        return self.x, self.weight, bias, *self[3:]

    def backward_arguments(self, dy: Sequence[Tensor], xa: Tensor, keep: Tensor, *need: bool) -> tuple[object, ...]:
        rest = self.scale, self.dropout_p, self.order, self.offsets
        return list(dy), self.x, self.weight, self.lora_a, self.lora_b, xa, keep, *rest, *(need or (True, True, True))

    def forward(self, implementation: str) -> tuple[list[Tensor], Tensor, Tensor]:
        """y, xa, keep."""
        return ops.implementation(self.case, implementation)(*self)

    def backward(
        self, implementation: str, dy: Sequence[Tensor], xa: Tensor, keep: Tensor, *need: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dx, and da and db flat."""
        return ops.implementation(f"{self.case}_backward", implementation)(
            *self.backward_arguments(dy, xa, keep, *need)
        )

    def both(self, implementation: str, dy: Sequence[Tensor], xa: Tensor | None = None) -> list[Tensor]:
        """Every y, then xa, dx, every da and every db. xa: what the backward gets instead of the forward's."""
        y, own_xa, keep = self.forward(implementation)
        dx, da, db = self.backward(implementation, dy, own_xa if xa is None else xa, keep)
        return [*y, own_xa, dx, *as_wide_as(self.lora_a, da), *as_wide_as(self.lora_b, db)]


def as_wide_as(adapters: Sequence[Tensor], flat: Tensor) -> list[Tensor]:
    """Gradients that lie one after the other, each in its adapter's shape."""
    assert flat.dim() == 1 and flat.numel() == sum(one.numel() for one in adapters)
    parts = flat.split([one.numel() for one in adapters])
    return [part.view(one.shape) for part, one in zip(parts, adapters, strict=True)]


def one_layer(layer: Layer, scale: float, dropout_p: float = 0.0, seed: Tensor | None = None) -> Arguments:
    """One layer with one adapter for all rows."""
    x, *rest = (detached(tensor) for tensor in layer[:5])
    return Arguments(x, *([one] for one in rest), [scale], [dropout_p], seed)
