"""A model, its tokenizer and its adapters from disk: whatever is not there, or not what it should be, is one error that names it."""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from fastlora import adapters as adapter_files
from fastlora.adapters import Adapter
from fastlora.data.rows import Row
from fastlora.typed import fits, listed, shown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype called `name`; "auto" is bfloat16 on a card that computes in it, and float32 everywhere else; "stored" is None, the checkpoint's.

    Raises:
        ValueError: another name.
    """
    if name == "auto":
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float32
    if name == "stored":
        return None
    if name not in DTYPES:
        raise ValueError(f"dtype={name!r}: expected one of auto, stored, {', '.join(DTYPES)}")
    return DTYPES[name]


def load_base(
    path: str,
    dtype: torch.dtype | None,
    device: torch.device,
    bits: int | None = None,
    attn_implementation: str | None = None,
) -> Any:
    """The causal language model or encoder-decoder saved in a folder, or known to the hub by that id.

    Args:
        dtype: None: the one that its config names, or else the one that its first weights are stored in.
        bits: 4 or 8: its linear layers are quantised by bitsandbytes, lm_head aside: to NF4 with double quantisation (Dettmers et al. 2023, QLoRA),
            or to int8; it must be there (`require_bitsandbytes`). None: they are as they are stored.
        attn_implementation: what its attention runs by, as transformers names it; None: what transformers takes for it.

    Raises:
        ValueError: the folder holds an adapter, the model is no language model, or its files are damaged, or lack weights that it has;
            transformers has no such attention for it.
        ImportError: a package of that attention is missing.
        OSError: there is no such model.
    """
    kind = _class_of(_base_config(path))
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # told below
    options |= _attention(path, dtype, device, attn_implementation)
    if bits is not None:
        options |= {"quantization_config": _quantisation(bits, dtype), "device_map": {"": device}}
    with _named(path, "the model"), _without_report():
        loaded: Any = kind.from_pretrained(path, dtype=dtype or "auto", trust_remote_code=False, **options)
    model, found = loaded
    # Weights that transformers has made up: the files have none for them, or of another shape.
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"model={path}: its files lack {len(missing)} of the model's weights: {listed(missing)}")
    for name, stored, expected in sorted(found["mismatched_keys"]):
        raise ValueError(
            f"model={path}: {name}: its files have shape {list(stored)}, expected {list(expected)} as config.json says"
        )
    ends = model.generation_config.eos_token_id
    if not fits(ends, int | list[int] | None):
        raise ValueError(f"model={path}: generation_config.json: eos_token_id: expected tokens, got {shown(ends)}")
    return model if bits is not None else model.to(device)


def empty_base(
    path: str,
    dtype: torch.dtype | None,
    device: torch.device,
    bits: int | None = None,
    attn_implementation: str | None = None,
) -> Any:
    """`load_base`'s model with the files of its weights unread: for a look at its parts. Its matrices are memory that nobody has written to, and
    that the system therefore has not given yet; its vectors are ones.

    Args:
        device: where it is to run; it is on the CPU. bits: unused, its layers are plain.

    Raises:
        OSError, ValueError, ImportError: as `load_base`, as far as config.json tells.
    """
    config, attention = _base_config(path), _attention(path, dtype, device, attn_implementation)
    with _named(path, "the model"):
        model = _without_weights(config, dtype, **attention)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                values = (
                    torch.empty(weight.shape, dtype=weight.dtype)
                    if weight.dim() > 1
                    else torch.ones(weight.shape, dtype=weight.dtype)
                )
                module._parameters[name] = torch.nn.Parameter(values, requires_grad=weight.requires_grad)
    model.tie_weights()
    return model


def _without_weights(config: Any, dtype: torch.dtype | None, **attention: str) -> Any:
    """A model of that config, whose parameters have no memory."""
    from accelerate import init_empty_weights

    chosen = dtype or getattr(config.get_text_config(), "dtype", None) or torch.float32
    with init_empty_weights(include_buffers=False):
        return _class_of(config).from_config(config, dtype=chosen, trust_remote_code=False, **attention)


def _attention(path: str, dtype: torch.dtype | None, device: torch.device, name: str | None) -> dict[str, str]:
    """What transformers is told of a model's attention, once it takes that: no weight is read for an error of a name."""
    if name is None:
        return {}
    if name == "flex_attention" and device.type == "cpu":
        raise ValueError(f"attn_implementation={name}: torch has no gradient of it on a CPU, expected sdpa or eager")
    config, told = _base_config(path), {"attn_implementation": name}
    try:
        _without_weights(copy.deepcopy(config), dtype, **told)  # transformers writes it into the config
    except Exception as error:  # of many kinds, as a kernel of the hub has
        with _named(path, "the model"):
            _without_weights(config, dtype)  # what is wrong with the model is no fault of the attention
        kind = ImportError if isinstance(error, ImportError) else ValueError
        raise kind(f"attn_implementation={name}: transformers does not take it for {path}: {error}") from error
    return told


def is_encoder_decoder(path: str) -> bool:
    """Whether that model is one, by its config; of a model that is loaded `model.config.is_encoder_decoder` says it.

    Raises:
        OSError, ValueError: as `load_base`, as far as config.json tells.
    """
    return bool(_base_config(path).is_encoder_decoder)


def require_decoder(path: str, what: str) -> None:
    """Raise ValueError for an encoder-decoder. what: is to be done with the model, and takes none."""
    if is_encoder_decoder(path):
        raise ValueError(f"model={path}: expected a decoder, got an encoder-decoder, which {what} does not take")


def _class_of(config: Any) -> Any:
    """transformers' class of models with a language model's head, by what the config says of their kind."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def require_bitsandbytes(bits: int) -> None:
    """Raise ImportError, which names the option, where bitsandbytes is not there or transformers finds it too old."""
    from transformers.utils.import_utils import BITSANDBYTES_MIN_VERSION, is_bitsandbytes_available

    if not is_bitsandbytes_available():
        raise ImportError(
            f"load_in_{bits}bit=True: needs bitsandbytes {BITSANDBYTES_MIN_VERSION} or newer: pip install bitsandbytes"
        )


def _quantisation(bits: int, dtype: torch.dtype | None) -> Any:
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype or torch.float32,
    )


@contextmanager
def _without_report() -> Iterator[None]:
    """Silence transformers' table of missing weights, of many lines, where an error of one line follows."""

    log = logging.getLogger("transformers.modeling_utils")

    def is_heard(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return "LOAD REPORT" not in text or not ("MISSING" in text or "MISMATCH" in text)

    log.addFilter(is_heard)
    try:
        yield
    finally:
        log.removeFilter(is_heard)


def load_tokenizer(path: str) -> Any:
    """The tokenizer saved beside a model, or known to the hub by the model's id.

    Raises:
        ValueError: the folder holds an adapter, no tokenizer, or one with tokens that the model's embedding has no rows for.
        OSError: there is no such model.
    """
    from transformers import AutoTokenizer

    config = _base_config(path)
    with _named(path, "its tokenizer"):
        tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    _check_vocabulary(path, tokenizer, getattr(config.get_text_config(), "vocab_size", None))
    return tokenizer


def _check_vocabulary(path: str, tokenizer: Any, rows: int | None) -> None:
    """Refuse tokens that a text may hold and the embedding does not; a special one that nothing here writes (an image's) does no harm."""
    if rows is None or len(tokenizer) <= rows:
        return
    written = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    template, special = str(tokenizer.chat_template or ""), tokenizer.added_tokens_decoder
    beyond = [
        token
        for token, number in tokenizer.get_vocab().items()
        if number >= rows
        and (number not in special or not special[number].special or token in written or token in template)
    ]
    if beyond:
        raise ValueError(
            f"model={path}: the tokenizer has {len(tokenizer):,} tokens and the embedding {rows:,} rows: none for"
            f" {beyond[0]!r}; expected a tokenizer of this model, or a model saved after resize_token_embeddings"
        )


def _base_config(path: str) -> Any:
    """The config of a base model, once the path is known not to be anything else."""
    from transformers import AutoConfig

    folder = Path(path)
    if adapter_files.is_adapter(folder):
        raise ValueError(
            f"model={path}: the folder holds an adapter, expected a base model; it is used as adapter={path}"
        )
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"model={path}: expected a folder with a model, there is no config.json")
    if folder.is_file():
        raise NotADirectoryError(f"model={path}: expected a folder with a model, got a file")
    if _is_path(path) and not folder.is_dir():
        raise FileNotFoundError(f"model: there is no folder {path}")
    with _named(path, "config.json"):
        return AutoConfig.from_pretrained(path, trust_remote_code=False)


def _is_path(name: str) -> bool:
    """Whether a model's name can be no hub id, OWNER/MODEL: it is not looked for there."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


@contextmanager
def _named(path: str, what: str) -> Iterator[None]:
    """Whatever transformers raises for a model that is not there, or that is damaged, says which one it is."""
    try:
        yield
    except OSError as error:
        if Path(path).is_dir():
            raise OSError(f"model={path}: {what} cannot be loaded: {error}") from error
        raise OSError(f"model={path}: neither a model's folder nor to be had from the hub: {error}") from error
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # of any kind: KeyError, RuntimeError, SafetensorError, tokenizers' own
        raise ValueError(f"model={path}: {what} cannot be loaded: {type(error).__name__}: {error}") from error


def load_model(
    path: str | None,
    adapters: Mapping[str, str | Path] | None = None,
    *,
    dtype: str = "auto",
    accelerate: bool = True,
    allow_missing: bool = False,
    allow_noop: bool = False,
) -> tuple[Any, Any]:
    """Load a base model and any number of adapters onto it, ready to answer.

    Args:
        path: the base: a folder or a hub id. None: the one that the first adapter was trained on.
        adapters: folders by adapter name; the first is the active one.
        dtype: the base's: auto, float32, bfloat16, float16, or stored, which is the checkpoint's own.
        accelerate: run the adapters' layers fused.
        allow_missing: tensors that an adapter's file lacks are as PEFT begins, with a warning, in place of an error.
        allow_noop: take also an adapter that changes nothing: B zero in every layer, most often.

    Returns:
        The model, in eval mode, on the GPU if there is one; and its tokenizer.

    Raises:
        TypeError: adapters are no folders by name.
        ValueError: a bad dtype or adapter name, no path and nothing that names one, or a damaged file; AdapterError: an adapter's.
        FileNotFoundError, OSError: an adapter or the model is not there.
    """
    adapters = {} if adapters is None else adapters
    if not isinstance(adapters, Mapping) or not fits(dict(adapters), dict[str, str | Path]):
        raise TypeError(f"adapters={shown(adapters)}: expected folders by adapter name, as in {{'default': FOLDER}}")
    for name in adapters:
        adapter_files.require_name(name)
    # As in training: this process's GPU if there is one, unless ACCELERATE_USE_CPU is set.
    device = PartialState().device
    chosen = resolve_dtype(dtype, device)
    read = {name: adapter_files.read(folder) for name, folder in adapters.items()}
    base = path or base_of(read.values())
    tokenizer = load_tokenizer(base)
    model = load_base(base, chosen, device)
    if read:
        loaded = adapter_files.load(model, read, allow_missing=allow_missing, allow_noop=allow_noop)
        model = loaded.requires_grad_(False)
        if accelerate:
            from fastlora import peft

            # A soft prompt, or IA³'s scales, have no LoRA layers.
            peft.accelerate(model, frozen=any(one.config.peft_type != "LORA" for one in read.values()))
    return model.eval(), tokenizer


def base_of(adapters: Iterable[Adapter]) -> str:
    """The base model that the first of the adapters was trained on.

    Raises:
        ValueError: none names one.
        FileNotFoundError: it was a folder, and is not there any more.
    """
    adapter = next((adapter for adapter in adapters if adapter.base), None)
    if adapter is None:
        raise ValueError("model: no base model was named, and no adapter names one")
    base = str(adapter.base)
    if _is_path(base) and not Path(base).is_dir():
        raise FileNotFoundError(
            f"adapter={adapter.folder}: it was trained on {base}, and there is no such folder any more: name the base as model=FOLDER"
        )
    return base


def blocks(model: Any) -> list[Any]:
    """The blocks that a transformers model, with adapters or without, is a stack of; none where transformers does not name their class."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = base._no_split_modules or ()
    return [module for module in base.modules() if type(module).__name__ in names]


def positions(model: Any) -> int | None:
    """How many tokens a row of the model may have, behind its soft prompt; None where its configuration does not say."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    configs = getattr(model, "peft_config", {})
    prompt = max((getattr(one, "num_virtual_tokens", None) or 0 for one in configs.values()), default=0)
    return None if most is None else most - prompt


def require_positions(model: Any, rows: Sequence[Row]) -> None:
    """Raise ValueError if a row, or a side of it, has more tokens than the model has positions for."""
    longest, most = max(len(side) for row in rows for side in row.sides), positions(model)
    if most is not None and longest > most:
        raise ValueError(
            f"max_length: the longest row has {longest} tokens and the model positions for {most};"
            f" expected max_length={most} or less"
        )
