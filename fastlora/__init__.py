"""fastlora: fused kernels that make parameter-efficient fine-tuning of transformers fast, on a CPU and on CUDA cards.

    y = x Wᵀ + b + s · d(x) Aᵀ Bᵀ, W and b frozen

`fastlora.accelerate(model)` speeds up a PEFT LoRA model in place; `LoRALinear`, `MultiLoRALinear` and `SoftPrompt` are modules for models
without PEFT; `fastlora.functional` holds the operators; `fastlora train` is the thin training loop.
"""

import importlib
from typing import TYPE_CHECKING, Any

from fastlora import distribution

if another := distribution.another():  # asked first: its files could stand in for this package's
    raise ImportError(another, name="fastlora")

from fastlora import ops

try:
    import fastlora._C as _C
except ImportError as error:
    ops.mark_missing("cpu", f"not built ({error})")
    ops.mark_missing("cuda", "not built")
    _C = None

from fastlora import functional, native
from fastlora.choice import table
from fastlora.layers import LoRAConv1D, LoRALinear, MultiLoRALinear, SoftPrompt

if _C is not None:
    native.enter("cpu")
    table.instruction_set = _C.isa
    if _C.cuda:
        native.enter("cuda")
        ops.note("cuda", f"; compiled for {', '.join(_C.cuda)}")
    else:
        ops.mark_missing("cuda", f"not compiled in ({_C.without_cuda})")


def _load_triton() -> None:
    for stem in ("lora_linear", "multi_lora", "prefix_concat"):
        importlib.import_module(f"fastlora.kernels.{stem}")


ops.implement_later("triton", _load_triton)

if TYPE_CHECKING:
    from fastlora.bank import AdapterBank
    from fastlora.data.mixture import Mixture
    from fastlora.data.tasks import Task
    from fastlora.data.templates import Template, TemplateSet
    from fastlora.peft import accelerate, merged, report, restore
    from fastlora.receipts import receipt

__version__ = distribution.__version__
__all__ = [
    "AdapterBank",
    "LoRAConv1D",
    "LoRALinear",
    "Mixture",
    "MultiLoRALinear",
    "SoftPrompt",
    "Task",
    "Template",
    "TemplateSet",
    "accelerate",
    "functional",
    "merged",
    "ops",
    "receipt",
    "report",
    "restore",
]

LATER = {
    **dict.fromkeys(("accelerate", "merged", "report", "restore"), "fastlora.peft"),
    "receipt": "fastlora.receipts",
    "AdapterBank": "fastlora.bank",
    "Mixture": "fastlora.data.mixture",
    "Task": "fastlora.data.tasks",
    **dict.fromkeys(("Template", "TemplateSet"), "fastlora.data.templates"),
}
"""Where to find what takes seconds to import, as peft does: only who asks for it waits."""


def __getattr__(name: str) -> Any:
    if name in LATER:
        return getattr(importlib.import_module(LATER[name]), name)
    raise AttributeError(f"module 'fastlora' has no attribute {name!r}")
