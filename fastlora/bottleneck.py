"""Bottleneck adapters, which PEFT has none of: small networks behind the sublayers of a transformer's blocks, or beside them.

    h + s · up(f(down(h))), h = F(x)        in series, behind attention and MLP (Houlsby et al. 2019)
    F(x) + s · up(f(down(x)))               in parallel, beside the MLP (He et al. 2022)

down is [R, D] and up [D, R], both with a bias; up begins as zeros, so that the model begins as it was. To PEFT they are one more of its methods:
`get_peft_model(model, BottleneckConfig(...))`, `PeftModel.from_pretrained` once this module is imported, switching, disabling. A sublayer gets a
module around it; what it is made of, quantised or not, stays as it is.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PeftConfig
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from fastlora.typed import listed, shown

NON_LINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "gelu": functional.gelu,
    "swish": functional.silu,
    "tanh": torch.tanh,
}
"""f, as the library `adapters` names them."""

PARALLEL_SCALING = 4.0
"""s beside an MLP where none is given: He et al. 2022 found it the best."""

DENSE = ("output.dense",)
ATTENTIONS = (
    ("SelfAttention", "EncDecAttention"),
    ("self_attn", "encoder_attn"),
    *(("self_attention",), ("attn",), ("attention",)),
)
MLPS = (("mlp",), ("DenseReluDense",), ("feed_forward",), ("block_sparse_moe",), ("ffn",))
LAST = ("fc2",)
"""How transformers' models call their sublayers, each kind in one of these ways. BERT's have the residual and the norm in them: there it is their
last linear layers, DENSE. OPT's and BART's MLP is no module of its own, but its last layer is."""

NO_MERGE = "a bottleneck adapter cannot be merged: what it adds is no linear function of x, which no weight can take up"


class Kind(StrEnum):
    """PEFT's list of its methods is closed; this stands in a configuration as one of them does."""

    BOTTLENECK = "BOTTLENECK"


@dataclass
class BottleneckConfig(PeftConfig):
    """Bottleneck adapters, as PEFT is told of them. The names are those of the library `adapters`.

    Args:
        target_modules: the sublayers, by their names' ends, or a regular expression for the whole names. None: in series attention and MLP,
            in parallel the MLP.
        reduction_factor: R is the model's width D over this, at least 1.
        non_linearity: f, one of NON_LINEARITIES.
        is_parallel: beside a sublayer, in place of behind it.
        scaling: s. None: 1 in series, PARALLEL_SCALING in parallel.

    Raises:
        ValueError: an option is out of range; the message names it.
    """

    target_modules: list[str] | str | None = field(default=None)
    reduction_factor: int = field(default=16)
    non_linearity: str = field(default="swish")
    is_parallel: bool = field(default=False)
    scaling: float | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type: Any = Kind.BOTTLENECK
        if self.reduction_factor < 1:
            raise ValueError(f"reduction_factor={shown(self.reduction_factor)}: expected at least 1")
        if self.scaling is not None and not math.isfinite(self.scaling):
            raise ValueError(f"scaling={shown(self.scaling)}: expected a finite number")
        if self.non_linearity not in NON_LINEARITIES:
            wanted = ", ".join(NON_LINEARITIES)
            raise ValueError(f"non_linearity={shown(self.non_linearity)}: expected one of {wanted}")


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A sublayer with adapters behind it or beside it. Several active adapters add up."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("configs",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig, width: int) -> None:
        super().__init__()
        self.base_layer, self.width = base_layer, width
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.configs: dict[str, BottleneckConfig] = {}
        self.add_adapter(adapter_name, config)

    def add_adapter(self, name: str, config: BottleneckConfig) -> None:
        like, size = next(self.base_layer.parameters()), max(1, self.width // config.reduction_factor)
        down, up = nn.Linear(self.width, size), nn.Linear(size, self.width)
        for zero in (down.bias, up.weight, up.bias):
            nn.init.zeros_(zero)
        self.bottleneck_down[name], self.bottleneck_up[name] = down, up
        self.configs[name] = config
        if down.weight.device.type != "meta":
            self.bottleneck_down[name].to(like.device), self.bottleneck_up[name].to(like.device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Of what the sublayer returns, a tensor [..., D] or a tuple that begins with one, that tensor has the adapters' part in it.

        Raises:
            ValueError: the tensor, or in parallel what the sublayer is given, is none of the model's width.
        """
        result = self.base_layer(*args, **kwargs)
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.configs]
        if not names:
            return result
        y = result[0] if isinstance(result, tuple) else result
        parts = []
        for name in names:
            config = self.configs[name]
            down: Any = self.bottleneck_down[name]
            up: Any = self.bottleneck_up[name]
            x = _first(args, kwargs) if config.is_parallel else y
            if not isinstance(x, Tensor) or x.shape[-1:] != (self.width,):
                side = "is given" if config.is_parallel else "gives"
                raise ValueError(
                    f"a {type(self.base_layer).__name__} {side} {_shape(x)}, expected a tensor"
                    f" [..., {self.width}] of the model's width"
                )
            default = PARALLEL_SCALING if config.is_parallel else 1.0
            scaling = default if config.scaling is None else config.scaling
            part = up(NON_LINEARITIES[config.non_linearity](down(x.to(down.weight.dtype))))
            parts.append(part if scaling == 1 else scaling * part)
        added = (y + sum(parts[1:], parts[0])).to(y.dtype)
        return (added, *result[1:]) if isinstance(result, tuple) else added

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise TypeError: it cannot be."""
        raise TypeError(NO_MERGE)


def _first(args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The hidden states that a sublayer is given."""
    return args[0] if args else kwargs.get("hidden_states")


def _shape(x: Any) -> str:
    return str(list(x.shape)) if isinstance(x, Tensor) else type(x).__name__


def sublayers(model: nn.Module, is_parallel: bool) -> list[str]:
    """What the sublayers are called that adapters stand behind, or in parallel the MLPs that they stand beside.

    Raises:
        ValueError: the model has none of the known names.
    """
    names = [name for name, _ in model.named_modules()]

    def called(*ways: Sequence[str]) -> list[str]:
        there = ([one for one in way if any(f".{name}".endswith(f".{one}") for name in names)] for way in ways)
        return next(filter(None, there), [])

    dense, attention, mlp = called(DENSE), called(*ATTENTIONS), called(*MLPS)
    if is_parallel:
        found = [] if dense else mlp
    else:
        mlp = mlp or called(LAST)
        found = dense or (attention + mlp if attention and mlp else [])
    if not found:
        wanted = "MLP" if is_parallel else "attention, or no MLP,"
        parts = {name.rpartition(".")[2] for name, module in model.named_modules() if module._modules}
        there = listed(sorted(part for part in parts if part and not part.isdecimal()))
        raise ValueError(
            f"target_modules: {type(model).__name__} has no {wanted} of a name that is known here;"
            f" name its sublayers, such as some of {there}"
        )
    return found


class BottleneckModel(BaseTuner):
    """What PEFT has around a model with bottleneck adapters."""

    prefix = "bottleneck_"
    tuner_layer_cls: Any = BottleneckLayer
    target_module_mapping: Any = {}

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if peft_config.target_modules is None:
            peft_config.target_modules = sublayers(self.model, peft_config.is_parallel)
        return peft_config

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: Any,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BottleneckLayer):
            target.add_adapter(adapter_name, peft_config)
            return
        config: Any = self.model.config
        width = config.get_text_config().hidden_size
        sizes = _sizes(target)
        if sizes is not None and (sizes[1] != width or (peft_config.is_parallel and sizes[0] != width)):
            raise ValueError(
                f"{current_key} is a {type(target).__name__} of {sizes[0]} to {sizes[1]} features,"
                f" expected the model's width, {width}"
            )
        if not any(True for _ in target.parameters()):
            raise ValueError(f"{current_key} is a {type(target).__name__}, which has no weights: expected a sublayer")
        layer = BottleneckLayer(target, adapter_name, peft_config, width)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        setattr(parent, child_name, new_module)  # no sublayer has a weight of its own to be handed on

    def _check_merge_allowed(self) -> None:
        raise TypeError(NO_MERGE)


def _sizes(module: Any) -> tuple[int, int] | None:
    """(in-features, out-features) of a linear layer."""
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    return (module.in_features, module.out_features) if isinstance(module, nn.Linear) else None


def own_parts(layer: BottleneckLayer) -> set[nn.Module]:
    """The layer and its adapters' parts, without the sublayer."""
    return {layer, *layer.bottleneck_down.modules(), *layer.bottleneck_up.modules()}


PEFT_TYPE_TO_CONFIG_MAPPING[Kind.BOTTLENECK] = BottleneckConfig  # type: ignore[index]
PEFT_TYPE_TO_TUNER_MAPPING[Kind.BOTTLENECK] = BottleneckModel  # type: ignore[index]
PEFT_TYPE_TO_PREFIX_MAPPING[Kind.BOTTLENECK] = BottleneckModel.prefix  # type: ignore[index]
