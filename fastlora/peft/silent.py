"""LoRA adapters that change nothing, and that nobody has said so of: PEFT loads a valid file whose keys match nothing without a word."""

import weakref
from collections.abc import Mapping
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import nn

MORE = ("modules_to_save", "trainable_token_indices", "use_dora", "lora_bias")
"""Of a config: what an adapter may change beside A and B."""

judged: "weakref.WeakKeyDictionary[nn.Module, set[str]]" = weakref.WeakKeyDictionary()
"""By model, the adapters whose loader refuses what changes nothing, or was told to take it; kept beside it, so that no copy or pickle has them."""


def silent_adapters(model: nn.Module) -> list[str]:
    """Those that are loaded for inference, and whose every B is zero: of a fresh adapter's file, or of one whose keys matched nothing."""
    configs: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    of_others = [name for name in configs if name not in judged.get(model, ())]
    return [name for name in of_others if configs[name].inference_mode and _is_silent(model, name, configs[name])]


def _is_silent(model: nn.Module, adapter: str, config: Any) -> bool:
    if str(getattr(config.peft_type, "value", "")) != "LORA" or any(getattr(config, one, None) for one in MORE):
        return False
    layers: list[Any] = [one for one in model.modules() if isinstance(one, LoraLayer) and adapter in one.r]
    held = [one.lora_B[adapter].weight if adapter in one.lora_B else one.lora_embedding_B[adapter] for one in layers]
    return bool(layers) and not any(one.is_meta or bool(one.any()) for one in held)
