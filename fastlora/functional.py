"""The operators as differentiable functions: what a caller may call.

    lora_linear             y = x Wᵀ + b + s d(x) Aᵀ Bᵀ
    lora_linear_shared      the same for layers that share x
    multi_lora              the same, where each row of x has its own adapter; group_rows sorts the rows once for many layers
    multi_lora_shared       both
    frozen_linear           y = x Wᵀ + b
    dora_factor             c = m / ‖W + s B A‖, row by row
    scale_columns           y = c ∘ u + b
    prefix_concat           rows [P ; x] with mask, positions and labels
    linear_cross_entropy    the loss of labels under logits h Wᵀ + b
    lora_cross_entropy      the same under h Wᵀ + b + xa Bᵀ
    attention               softmax(scale q kᵀ) v within segments of tokens, and over what they share
    rms_norm                x w / sqrt(mean(x²) + eps)
    rotary                  queries and keys turned by the angles of their positions
    swiglu                  silu(gate) up

Arguments are checked before any memory is touched; every error names the argument, what it is, and what was expected.

A backward is all that an operator has. NotImplementedError is raised inside torch.func's transforms, for tensors with a forward-mode tangent, and
where a backward is differentiated again.
"""

from fastlora.checks import raise_pending
from fastlora.operators.attention import attention
from fastlora.operators.dora_factor import dora_factor
from fastlora.operators.frozen_linear import frozen_linear
from fastlora.operators.linear_cross_entropy import linear_cross_entropy
from fastlora.operators.lora_cross_entropy import lora_cross_entropy
from fastlora.operators.lora_linear import (
    RowGroups,
    group_rows,
    lora_linear,
    lora_linear_shared,
    multi_lora,
    multi_lora_shared,
)
from fastlora.operators.prefix_concat import Prefixed, prefix_concat
from fastlora.operators.rms_norm import rms_norm
from fastlora.operators.rotary import rotary
from fastlora.operators.scale_columns import scale_columns
from fastlora.operators.swiglu import swiglu

__all__ = [
    "Prefixed",
    "RowGroups",
    "attention",
    "dora_factor",
    "frozen_linear",
    "group_rows",
    "linear_cross_entropy",
    "lora_cross_entropy",
    "lora_linear",
    "lora_linear_shared",
    "multi_lora",
    "multi_lora_shared",
    "prefix_concat",
    "raise_pending",
    "rms_norm",
    "rotary",
    "scale_columns",
    "swiglu",
]
