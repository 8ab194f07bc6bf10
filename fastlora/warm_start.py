"""A training that begins with an adapter's values: `init_adapter`. The adapter's own configuration says what is trained, and how it is shaped."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastlora import adapters
from fastlora.adapters import Adapter, AdapterError
from fastlora.config import OPTIONS_OF, Method, TrainConfig
from fastlora.typed import shown

METHOD_OF: Mapping[str, Method] = {
    "LORA": "lora",
    "IA3": "ia3",
    "LN_TUNING": "norm",
    "TRAINABLE_TOKENS": "tokens",
    "BOTTLENECK": "adapter",
    "PROMPT_TUNING": "prompt",
    "PREFIX_TUNING": "prefix",
    "P_TUNING": "ptuning",
    "CARTRIDGE": "cartridge",
}
"""Our name of each of PEFT's methods; method peft takes them all, and those that have none."""
BEGINNINGS = (
    "init_lora_weights",
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "prefix_projection",
    "encoder_hidden_size",
)
"""What makes a prompt's first values: of no use where they are there."""


def resolved(config: TrainConfig, checkpoint: Path | None) -> TrainConfig:
    """The options with what the adapter says in the place of what nobody said; as they are without init_adapter.

    Args:
        checkpoint: of the run that goes on, whose adapter it is by now: init_adapter itself may be gone.

    Raises:
        OSError: the folder holds no adapter.
        ValueError: its configuration is damaged; the method, or an option that was given, is another than the adapter's.
    """
    if config.init_adapter is None:
        return config
    own = _config_of(Path(config.init_adapter) if checkpoint is None else checkpoint)
    method = METHOD_OF.get(own.peft_type.value, "peft")
    if getattr(own, "use_dora", False):
        method = "dora"
    if config.method not in (method, "peft"):
        raise ValueError(f"method={config.method}: init_adapter={config.init_adapter} needs method={method}")
    unsaid = TrainConfig(model="m", data="d", output="o", method=config.method, init_adapter=config.init_adapter)
    found: dict[str, Any] = {}
    for name in OPTIONS_OF:
        value, theirs = getattr(config, name), _plain(getattr(own, name, None))
        given = value != getattr(unsaid, name)
        if name in BEGINNINGS or theirs is None or method not in OPTIONS_OF[name]:
            theirs = getattr(unsaid, name)
        if given and not _is_same(value, theirs):
            has = "begins with its own values" if name in BEGINNINGS else f"has {shown(theirs)}"
            raise ValueError(f"{name}={shown(value)}: init_adapter={config.init_adapter} {has}, expected that or none")
        if config.method == method:
            found[name] = value if given else theirs
    return replace(config, **found)


def told(config: TrainConfig) -> dict[str, str]:
    """What the banner says of it: the adapter's options that are not as they are unless told. config: as `resolved` gives it."""
    if config.init_adapter is None:
        return {}
    unsaid = TrainConfig(model="m", data="d", output="o", method=config.method, init_adapter=config.init_adapter)
    names = [name for name in OPTIONS_OF if name not in BEGINNINGS and config.method in OPTIONS_OF[name]]
    own = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(unsaid, name)}
    words = ", ".join(f"{name}={shown(value)}" for name, value in own.items())
    return {"begins": f"with {config.init_adapter}" + f", whose {words} hold{'s' * (len(own) == 1)}" * bool(own)}


def _is_same(value: Any, theirs: Any) -> bool:
    return sorted(value) == sorted(theirs) if isinstance(value, list) and isinstance(theirs, list) else value == theirs


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def _config_of(folder: Path) -> Any:
    """PEFT's configuration of the adapter in a folder, which may be no more than that."""
    if not folder.is_dir():
        raise FileNotFoundError(f"init_adapter={folder}: there is no such folder")
    if not (folder / adapters.CONFIG).is_file():
        raise FileNotFoundError(
            f"init_adapter={folder}: expected an adapter in PEFT's format, there is no {adapters.CONFIG}"
        )
    try:
        return adapters.read_config(folder / adapters.CONFIG)
    except AdapterError as error:
        raise ValueError(f"init_{error}") from error


def begun(model: Any, config: TrainConfig, checkpoint: Path | None) -> Any:
    """The model with the adapter on it, or with the checkpoint's of the run that goes on, to be trained.

    Raises:
        OSError: it is not there.
        ValueError: its files are damaged, are none of this model's, or lack what an encoder was that made a prompt.
    """
    try:
        adapter: Adapter = adapters.read(Path(str(config.init_adapter)) if checkpoint is None else checkpoint)
        adapter.config.base_model_name_or_path = str(config.model)  # it may have been a copy elsewhere
        return adapters.load(model, {"default": adapter}, is_trainable=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"init_{error}") from error
    except AdapterError as error:
        raise ValueError(f"init_{error}") from error
