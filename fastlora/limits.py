"""What a machine can do at most: the rate of large products; and the products of a training step, to hold against it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlora.choice.clock import Clock, Run, time_in_turn
from fastlora.frozen import packed

WIDTHS = {"cuda": 8192, "cpu": 1536}  # of a large product


def packs(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN multiplies here by weights of this dtype that it has laid out."""
    here = device.type == "cpu" and torch.backends.mkldnn.is_available()
    return here and (dtype == torch.float32 or (dtype == torch.bfloat16 and packed.suits_onednn(dtype)))


def packed_product(x: Tensor, weight: Tensor) -> Run:
    """x [M, K] and weight [N, K] -> [M, N], on a copy of the weight that oneDNN has laid out."""
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
    return lambda _: torch.ops.mkldnn._linear_pointwise(x, laid_out, None, "none", [], "")


def fastest_product(
    device: torch.device, dtype: torch.dtype, clock: Clock, budget: float, width: int | None = None
) -> float:
    """FLOPs a second in the fastest large product of that dtype, measured `budget` seconds; a CPU without a library for it goes by way of float32.

    The best of many samples: what others do on the machine meanwhile does not lower its limit. No generator is drawn from.

    Args:
        width: of the square matrices; None: one that reaches the limit to a per cent or so.
    """
    size = width or WIDTHS[device.type]
    generator = torch.Generator(device).manual_seed(0)
    if device.type == "cpu" and not packed.has_library(dtype):
        dtype = torch.float32
    x, w = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty_like(x)
    runs: dict[str, Run] = {"torch.mm": lambda _: torch.mm(x, w, out=out)}
    # torch multiplies float32 by MKL and packs bfloat16 anew each time; where oneDNN with a packed weight is faster, this is the limit.
    runs |= {"oneDNN": packed_product(x, w)} if packs(dtype, device) else {}
    times = time_in_turn(runs, clock, budget)
    return 2 * size**3 / min(timing.fastest for timing in times.values())


class Products:
    """How many FLOPs the products of a model's training step have, from its sizes: of a causal model whose layers are dense.

    Forward 2 a weight and token, as many for the gradient of what a layer is given, and as many for that of a weight that is trained; the head's
    for labelled tokens only; attention's of a causal half. What is computed twice to save memory counts once.
    """

    def __init__(self, model: Any) -> None:
        config, head = model.config.get_text_config(), model.get_output_embeddings()
        ends = {id(one.weight) for one in (model.get_input_embeddings(), head) if one is not None}
        body = [(p.numel(), p.requires_grad) for p in model.parameters() if p.dim() == 2 and id(p) not in ends]
        self.token = sum(count * (6 if trained else 4) for count, trained in body)
        self.label = 0
        if head is not None:
            self.label = head.weight.numel() * (6 if head.weight.requires_grad else 4)
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        self.pair = 12 * width * config.num_hidden_layers  # of tokens that see one another: two products, three times

    @staticmethod
    def known(model: Any) -> bool:
        """Whether the sizes tell it: no experts, of which a token has a few, no encoder, no quantised weights."""
        config = model.config
        sizes = ("num_attention_heads", "hidden_size", "num_hidden_layers")
        dense = all(p.dim() < 3 and p.is_floating_point() for p in model.parameters())
        return (
            dense
            and not config.is_encoder_decoder
            and all(getattr(config.get_text_config(), name, None) for name in sizes)
        )

    def flops(self, lengths: Sequence[int], labelled: int) -> float:
        """
        Args:
            lengths: tokens of each row.
            labelled: tokens that count in the loss, of all rows.
        """
        return self.token * sum(lengths) + self.label * labelled + self.pair * sum(n * n for n in lengths) / 2
