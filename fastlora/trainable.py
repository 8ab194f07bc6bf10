"""The model that is trained: its base as it is loaded, the adapter on it, and what runs its layers."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlora import adapters, checkpoint, ops, warm_start
from fastlora.config import OPTIONS_OF, RANKED, WHOLE, TrainConfig
from fastlora.course import UnsuitableError
from fastlora.models import blocks, load_base
from fastlora.peft import accelerate, quantised
from fastlora.typed import listed


def build(
    config: TrainConfig,
    dtype: torch.dtype,
    device: torch.device,
    resume_from: Path | None,
    load: Callable[..., Any] = load_base,
) -> Any:
    """The model with what is trained of it requiring gradients: a new adapter, or the whole of it; or a checkpoint's.

    load: as `load_base`.

    Raises:
        ValueError: a name in target_modules matches nothing, or no layer; compile, and transformers does not say what the layers are;
            an encoder-decoder does not say what its decoder's input begins with; AdapterError: the checkpoint's adapter is none of this model's.
        OSError, ValueError: as `load_base`.
    """
    if config.method in WHOLE:
        model = load(str(resume_from or config.model), torch.float32, device)
        if config.method == "bitfit":
            _train_biases(model)
        elif config.layers_to_transform is not None:
            _train_blocks(model, config.layers_to_transform)
        if config.accelerate:
            accelerate(model, frozen=has_frozen(config), fuse=True, share_prefix=config.share_prefix)
    else:
        base = load(str(config.model), dtype, device, config.bits)
        for module in base.modules():
            quantised.hold(module)  # it may be asked in eval mode, and must have a gradient afterwards
        model = _add_adapter(base, config, resume_from)
    if model.config.is_encoder_decoder:
        _require_start(model, config)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.compile:
        _compile_layers(model)
    return model


def _require_start(model: Any, config: TrainConfig) -> None:
    """An encoder-decoder makes its decoder's input of the labels: what a token begins it with, the config must say."""
    try:
        model.prepare_decoder_input_ids_from_labels(torch.zeros(1, 1, dtype=torch.long))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"model={config.model}: config.json: decoder_start_token_id: expected the token that the decoder's input begins with: {error}"
        ) from error


def take(model: Any, config: TrainConfig, folder: Path, trained: Mapping[str, Tensor]) -> None:
    """Give what is trained the values that it has in a checkpoint's folder.

    Raises:
        CheckpointError, AdapterError: the checkpoint is damaged, or of another model; no value is changed then.
    """
    checkpoint.verify(folder)
    if config.method in RANKED:
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        own, saved = get_peft_model_state_dict(model, save_embedding_layers=False), adapters.read(folder).tensors
        if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in saved.items()}:
            raise checkpoint.CheckpointError(
                f"{folder / adapters.WEIGHTS}: its tensors are not those of this run's adapter"
            )
        set_peft_model_state_dict(model, saved)
    elif config.method in WHOLE:
        saved = dict(load_base(str(folder), torch.float32, torch.device("cpu")).named_parameters())
        with torch.no_grad():
            for name, value in trained.items():
                value.copy_(saved[name])
    else:
        checkpoint.load_weights(folder, trained)


def stored_dtype(path: str) -> torch.dtype:
    """The dtype that a model's weights have on the disk: what its config says, or else its first tensor."""
    from safetensors import safe_open
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    for file in sorted(Path(path).glob("*.safetensors")):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():
                return weights.get_tensor(name).dtype
    return torch.float32


def targets(model: Any, target_modules: str | list[str]) -> str | list[str]:
    """target_modules as PEFT takes them: a str stays what it is there; in a list, all-linear becomes the layers it stands for.

    Raises:
        ValueError: a name, or the regular expression, matches no module.
    """
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _maybe_include_all_linear_layers

    modules = {name for name, _ in model.named_modules() if name}
    whole = "all-linear"
    if isinstance(target_modules, str):
        if target_modules.lower() != whole and not any(re.fullmatch(target_modules, name) for name in modules):
            raise ValueError(
                f"target_modules={target_modules!r}: the regular expression matches no module's whole name;"
                f" there are {_examples(model)}"
            )
        return target_modules
    names = {name for name in target_modules if name.lower() != whole}
    unmatched = [
        name for name in sorted(names) if not any(module == name or module.endswith(f".{name}") for module in modules)
    ]
    if unmatched:
        raise ValueError(
            f"target_modules: no module is called {', '.join(map(repr, unmatched))}; there are {_examples(model)}"
        )
    if len(names) < len(set(target_modules)):
        linear: Any = _maybe_include_all_linear_layers(LoraConfig(task_type=_task(model), target_modules=whole), model)
        names |= linear.target_modules
    return sorted(names)


def _examples(model: Any) -> str:
    """What the layers with a weight matrix are called, as one would name them: the last part, the most frequent first."""
    layers = [
        name for name, module in model.named_modules() if getattr(getattr(module, "weight", None), "ndim", 0) == 2
    ]
    return listed([name for name, _ in Counter(name.rpartition(".")[2] for name in layers).most_common()])


def _train_biases(model: Any) -> None:
    """Freeze all but the biases (Ben Zaken et al. 2022, BitFit).

    Raises:
        UnsuitableError: the model has none.
    """
    biases = [p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    if not biases:
        raise UnsuitableError(f"method=bitfit: {type(model).__name__} has no biases; norm trains its norms' weights")
    model.requires_grad_(False)
    for parameter in biases:
        parameter.requires_grad_(True)


def has_frozen(config: TrainConfig) -> bool:
    """Whether a part of a base that is trained is not."""
    return config.method == "bitfit" or config.layers_to_transform is not None


def _train_blocks(model: Any, numbers: list[int]) -> None:
    """Freeze all but some blocks."""
    _require_blocks(model, numbers)
    model.requires_grad_(False)
    for number in numbers:
        blocks(model)[number].requires_grad_(True)


def _require_blocks(model: Any, numbers: list[int]) -> None:
    """
    Raises:
        ValueError: the model has no block of a number, or transformers does not say what its blocks are.
    """
    count = len(blocks(model))
    beyond = [number for number in numbers if number >= count]
    if beyond:
        there = f"{type(model).__name__} has blocks 0 to {count - 1}" if count else "its blocks are not known"
        raise ValueError(f"layers_to_transform: got {beyond}, but {there}")


def _add_adapter(model: Any, config: TrainConfig, resume_from: Path | None) -> Any:
    """A new adapter on the model, or a checkpoint's. LoRA's own file holds all that is trained; of the others the run restores it by name."""
    from peft import get_peft_model

    if config.init_adapter is not None:
        model = warm_start.begun(model, config, resume_from)
    elif resume_from and config.method in RANKED:
        model = adapters.load(model, {"default": adapters.read(resume_from)}, is_trainable=True)
    else:
        new = peft_config(model, config)
        try:
            model = get_peft_model(model, new)
        except ValueError as error:  # a module that is no layer, say
            raise ValueError(f"{_blamed(config)}: {error}") from error
    if config.accelerate:
        accelerate(model, frozen=True, fuse=True, share_prefix=config.share_prefix, pack_budget=config.pack_budget)
    return model


def _blamed(config: TrainConfig) -> str:
    """The option that PEFT refuses, as a message names it."""
    if "target_modules" in config.__dict__ and config.method in OPTIONS_OF["target_modules"]:
        return f"target_modules={config.target_modules!r}"
    return f"peft_config={config.peft_config}" if config.method == "peft" else f"method={config.method}"


UNTRAINED = {
    "ADALORA": "its ranks are dealt out anew after every step, by a call that this loop does not make",
    **dict.fromkeys(("POLY", "MULTITASK_PROMPT_TUNING"), "its rows need task_ids, which rows of text do not have"),
    "CPT": "its loss is of its context's tokens, too",
    "XLORA": "it mixes adapters that were trained before",
    "SHADOW": "its layers return more than the model's blocks take",
    **dict.fromkeys(
        ("FROD", "SHIRA"),
        "it is made of the weights' values, without which adapters are checked here before they are loaded",
    ),
}
"""PEFT's methods that need more than a loop over rows gives, and why."""


def peft_config_digest(config: TrainConfig) -> str:
    """SHA-256 of the file that peft_config names, of nothing where there is none."""
    path = None if config.peft_config is None else Path(config.peft_config)
    return sha256(path.read_bytes() if path is not None and path.is_file() else b"").hexdigest()


def peft_config(model: Any, config: TrainConfig) -> Any:
    """PEFT's configuration of the method.

    Raises:
        ValueError: a name in target_modules matches nothing; no sublayer has a name that is known; a token has no row in the model's embedding;
            peft_config is no file of PEFT's, or one of UNTRAINED.
        OSError: peft_config is not there.
    """
    import peft

    if config.method == "peft":
        new = adapters.read_config(Path(str(config.peft_config)))
        method = str(getattr(new.peft_type, "value", new.peft_type))
        if method in UNTRAINED:
            raise ValueError(
                f"peft_config={config.peft_config}: peft_type: {method} is not trained here: {UNTRAINED[method]}"
            )
        new.inference_mode, new.task_type = False, _task(model)
        return new
    options: dict[str, Any] = {"task_type": _task(model)}
    if config.method in RANKED:
        options |= {name: getattr(config, name) for name in ("r", "lora_alpha", "lora_dropout", "use_rslora")}
        wanted = targets(model, config.target_modules)
        if config.layers_to_transform is not None:
            _require_blocks(model, config.layers_to_transform)
            if config.target_modules == "all-linear":
                # By the last parts of their names: PEFT takes a whole name for what it is, whatever its block.
                wanted = sorted({name.rpartition(".")[2] for name in targets(model, ["all-linear"])})
            if isinstance(wanted, str):
                raise ValueError(
                    f"layers_to_transform={config.layers_to_transform}: expected names in target_modules beside it,"
                    f" got the regular expression {wanted!r}, which can tell blocks apart itself"
                )
            options["layers_to_transform"] = config.layers_to_transform
        begun = config.init_lora_weights or True
        return peft.LoraConfig(
            target_modules=wanted, use_dora=config.method == "dora", init_lora_weights=begun, **options
        )
    if config.method in ("ia3", "norm"):
        named = None if config.target_modules == "all-linear" else targets(model, config.target_modules)
        if config.method == "norm":
            return peft.LNTuningConfig(target_modules=named or _norms(model), **options)
        return _ia3_config(model, named, options)
    if config.method == "adapter":
        from fastlora.bottleneck import BottleneckConfig, sublayers

        whole = config.target_modules == "all-linear"
        named = sublayers(model, config.is_parallel) if whole else targets(model, config.target_modules)
        options |= {
            one: getattr(config, one) for one in ("reduction_factor", "non_linearity", "is_parallel", "scaling")
        }
        return BottleneckConfig(target_modules=named, **options)
    if config.method == "tokens":
        rows, most = model.get_input_embeddings().weight.shape[0], max(config.token_indices or [0])
        if most >= rows:
            raise ValueError(
                f"token_indices: {most} has no row in the model's embedding, expected tokens below {rows:,}"
            )
        return peft.TrainableTokensConfig(token_indices=list(config.token_indices or ()), **options)
    options["num_virtual_tokens"] = config.num_virtual_tokens
    if model.config.is_encoder_decoder and config.method in ("prompt", "ptuning"):
        options["num_transformer_submodules"] = (
            1  # before the encoder's input: PEFT makes twice the rows, and uses those
        )
    if config.method == "prompt":
        text = config.prompt_tuning_init_text
        if text:
            options |= {"prompt_tuning_init_text": text, "tokenizer_name_or_path": str(config.model)}
        return peft.PromptTuningConfig(prompt_tuning_init=config.prompt_tuning_init, **options)
    if config.method == "cartridge":
        return peft.CartridgeConfig(**options)
    options["encoder_hidden_size"] = config.encoder_hidden_size
    if config.method == "ptuning":
        return peft.PromptEncoderConfig(**options)
    return peft.PrefixTuningConfig(prefix_projection=config.prefix_projection, **options)


def _task(model: Any) -> str:
    """PEFT's name of what the model is for."""
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def _norms(model: Any) -> list[str]:
    """What the model's norms are called, by the last part of their names."""
    found = {
        name.rpartition(".")[2] for name, module in model.named_modules() if "norm" in type(module).__name__.lower()
    }
    if not found:
        raise UnsuitableError(f"method=norm: {type(model).__name__} has no norms; target_modules names them")
    return sorted(found)


def _ia3_config(model: Any, named: Any, options: dict[str, Any]) -> Any:
    """PEFT's choice of layers where it has one for this kind of model; else keys, values and what comes out of an MLP (Liu et al. 2022)."""
    import peft
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as KNOWN

    if named is not None or model.config.model_type in KNOWN:
        return peft.IA3Config(target_modules=named, **options)
    feedforward = targets(model, ["down_proj"])
    return peft.IA3Config(
        target_modules=targets(model, ["k_proj", "v_proj", "down_proj"]), feedforward_modules=feedforward, **options
    )


def shown(runs: Mapping[str, int]) -> str:
    """What `implementations` gives, for people."""
    titles = {**ops.TITLES, "reference": "plain PyTorch", "peft": "PEFT"}
    told = [f"{count} layer{'s' * (count > 1)} by {titles.get(name, name)}" for name, count in runs.items()]
    return ", ".join(told) or "plain PyTorch"


def require_compiler() -> None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise ValueError(
            f"compile: torch.compile needs a C++ compiler, and {compiler} is not on the PATH:"
            " install it, name another one in CXX, or train without compile=True"
        )


def _compile_layers(model: Any) -> None:
    """Have torch compile each of the blocks that the model is a stack of; what stands around them stays eager."""
    layers = blocks(model)
    if not layers:
        raise ValueError(f"compile: transformers does not say what the layers of {type(model).__name__} are")
    for layer in layers:
        # Batches differ in width, and a resumed run meets them in another order: one code for all widths, from the first on.
        layer.compile(dynamic=True)


def implementations(model: Any, config: TrainConfig) -> dict[str, int]:
    """How many layers each implementation runs, as `report` tells; of compiled layers it is a guess, and says so.

    A soft prompt and what rows share count as one, by the way that they run; until they have run there is none to tell.
    """
    if config.method in WHOLE:
        return {}
    if not config.accelerate:
        from peft.tuners.tuners_utils import BaseTunerLayer

        return {"peft": sum(isinstance(module, BaseTunerLayer) for module in model.modules())}
    from fastlora.peft.layers import NOT_CALLED
    from fastlora.peft.reporting import NOT_OBSERVED, layers
    from fastlora.sharing import APART

    guess = f" ({NOT_OBSERVED})"
    told = [one for one in layers(model) if one.implementation != APART or not one.reason.startswith(NOT_CALLED)]
    return dict(Counter(one.implementation + guess * one.reason.startswith(NOT_OBSERVED) for one in told))
