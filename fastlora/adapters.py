"""Adapter folders in PEFT's format: read without a model, checked against one, and only then loaded.

`read` takes a folder and gives its config and tensors, or says which file and key is wrong; it needs no model, allocates no more than the files hold
and runs none of their patterns. `load` asks PEFT which tensors an adapter of that config has on that model, takes exactly those, and changes the
model only when every adapter has passed. A file may hold what it likes: no key of it reaches a weight of the base.
"""

import copy
import functools
import json
import logging
import math
import re
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastlora import reading, receipts
from fastlora.layers import BASE
from fastlora.typed import fits, listed, shown, spelt

logger = logging.getLogger("fastlora")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LARGEST_HEADER = 100_000_000  # bytes; safetensors' own limit
LARGEST_RANK, MOST_LAYERS = 1 << 16, 1 << 12  # what a config may ask to be allocated
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4}
"""Bytes an element. Whole numbers are a BatchNorm's count, or where a sparse adapter's values belong."""
WRAPPERS = re.compile(r"\.(base_layer|original_module|modules_to_save)(?=\.)")  # PEFT's, in a name of the base's
PATIENCE = 10.0  # seconds that a config's regular expressions may take on a model's names


class AdapterError(ValueError):
    """An adapter's file is not what it should be; `file` and `key` (None: the whole file) say where."""

    def __init__(self, file: Path, key: str | None, problem: str) -> None:
        super().__init__(f"adapter={file.parent}: {file.name}: {f'{key}: ' if key else ''}{problem}")
        self.file, self.key, self.problem = file, key, problem

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.file, self.key, self.problem)


@dataclass(frozen=True)
class Adapter:
    folder: Path
    config: Any  # PEFT's
    tensors: dict[str, Tensor]  # by PEFT's keys, on the CPU
    hashes: Mapping[str, str]  # SHA-256 of the two files, by name

    @property
    def base(self) -> str | None:
        """The model that it was trained on, as it names it: a folder or a hub id."""
        return self.config.base_model_name_or_path or None


def read(folder: str | Path) -> Adapter:
    """The adapter in a folder, of any of PEFT's methods.

    Raises:
        FileNotFoundError: the folder, or one of the two files, is not there.
        AdapterError: a file cannot be what PEFT writes: no JSON object, a value of the wrong type or out of range, another method, a broken header, a
            tensor of another dtype, empty, not finite, or of a rank that the config does not have.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"adapter={folder}: there is no such folder")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            holds_model = (folder / "config.json").is_file() and name == CONFIG
            hint = f"; it holds a model, and is used as model={folder}" if holds_model else ""
            raise FileNotFoundError(
                f"adapter={folder}: expected an adapter folder in PEFT's format, there is no {name}{hint}"
            )
    hashes = {CONFIG: receipts.file_hash(folder / CONFIG)}
    config = read_config(folder / CONFIG)
    # Read once: what is checked and hashed is what is used, whoever writes to the file meanwhile.
    content = (folder / WEIGHTS).read_bytes()
    hashes[WEIGHTS] = sha256(content).hexdigest()
    _check_header(folder / WEIGHTS, content)
    try:
        tensors = dict(sorted(safetensors.torch.load(content).items()))
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise AdapterError(folder / WEIGHTS, None, f"no safetensors file: {error}") from error
    del content  # the tensors have memory of their own
    _check_tensors(folder / WEIGHTS, config, tensors)
    return Adapter(folder, config, tensors, hashes)


def is_adapter(folder: str | Path) -> bool:
    return (Path(folder) / CONFIG).is_file()


def folders_in(folder: str | Path, argument: str) -> dict[str, Path]:
    """The adapters in a folder, by the names of their own folders. argument: what the caller calls the folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it is an adapter's own, or has none in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{argument}={folder}: there is no such folder")
    if is_adapter(folder):
        raise ValueError(f"{argument}={folder}: this is an adapter's own folder, expected one with such folders in it")
    found = {one.name: one for one in sorted(folder.iterdir()) if is_adapter(one)}
    if not found:
        raise ValueError(f"{argument}={folder}: no folder in it has an {CONFIG}")
    return found


METHODS = (
    *("LORA", "IA3", "LN_TUNING", "TRAINABLE_TOKENS", "BOTTLENECK"),
    *("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "CARTRIDGE"),
)
"""PEFT's names of what this library knows, and that of bottleneck.py's adapters, which PEFT has none of; PEFT's others are read as it has them."""

LARGEST_NUMBER = 10_000_000  # of others' whole numbers: some are sizes that PEFT counts up to


def read_config(file: Path) -> Any:
    """PEFT's configuration in a JSON file.

    Raises:
        OSError: it is not there.
        AdapterError: it is none of PEFT's methods, or has a value of the wrong type or out of range.
    """
    try:
        values = reading.json_file(file)
    except ValueError as error:
        raise AdapterError(file, None, str(error)) from error
    values.pop("runtime_config", None)  # PEFT writes none, and ignores one
    method = values.get("peft_type")
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING  # takes seconds to import

    import fastlora.bottleneck  # noqa: F401  (enters its adapters there)

    by_name: dict[str, Any] = {one.value: config for one, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if not isinstance(method, str) or method not in by_name:
        wanted = ", ".join(map(repr, METHODS))
        raise AdapterError(file, "peft_type", f"expected {wanted} or another of PEFT's methods, got {shown(method)}")
    config_class = by_name[method]
    types_of = _json_types(config_class)
    unknown = sorted(values.keys() - types_of.keys())
    if unknown:  # written by another PEFT
        logger.warning(
            "adapter=%s: %s: this PEFT does not know and ignores %s", file.parent, file.name, listed(unknown)
        )
        values = {name: value for name, value in values.items() if name in types_of}
    for name, value in values.items():
        is_usable, wanted = RANGES.get(name, (lambda _: True, ""))
        if not fits(value, types_of[name]):
            raise AdapterError(file, name, f"expected {spelt(types_of[name])}, got {shown(value)}")
        # PEFT's own default may lie beyond, as OFT's r of 0: it has a size of blocks in its place.
        if not is_usable(value) and value != getattr(config_class, name, ...):
            raise AdapterError(file, name, f"expected {wanted}, got {shown(value)}")
        if method not in METHODS and isinstance(value, int) and abs(value) > LARGEST_NUMBER:
            raise AdapterError(file, name, f"expected a number up to {LARGEST_NUMBER:,}, got {shown(value)}")
    try:
        return config_class(**values)
    except Exception as error:  # PEFT checks little: AttributeError, KeyError, ...
        raise AdapterError(file, None, f"PEFT does not take it: {error}") from error


WIDER: dict[str, Any] = {"lora_alpha": float, "init_lora_weights": bool | str}


@functools.cache
def _json_types(config_class: type) -> dict[str, Any]:
    """The type that every field of one of PEFT's configurations has in JSON."""
    types_of = {name: _in_json(hint) for name, hint in get_type_hints(config_class).items()}
    # What PEFT finds out from the model, as a prompt's token_dim, is null in a file that knows no model yet.
    types_of |= {one.name: types_of[one.name] | None for one in fields(config_class) if one.default is None}
    # PEFT's own annotations are too narrow for what it writes: alphas with a fraction, "pissa_niter_16".
    return types_of | {name: hint for name, hint in WIDER.items() if name in types_of}


def _in_json(hint: Any) -> Any:
    """What JSON has in the place of a field's value: for an enum its name, for a dataclass an object."""
    if get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(_in_json(one) for one in get_args(hint))]  # noqa: UP007  (of as many as there are)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return str
    return dict if is_dataclass(hint) else hint


def _is_rank(value: Any) -> bool:
    return type(value) is int and 1 <= value <= LARGEST_RANK


def is_number(value: Any) -> bool:
    """Whether a lora_alpha can be used."""
    return type(value) in (int, float) and abs(value) <= torch.finfo(torch.float32).max


def _are_tokens(value: list[int] | dict[str, list[int]] | None) -> bool:
    by_name = value.values() if isinstance(value, dict) else [value or []]
    return all(token >= 0 for token in chain.from_iterable(by_name))


def _are_ranges(value: list[tuple[int, int]] | None) -> bool:
    within = 0 < sum(end - start for start, end in value or [(0, 1)]) <= MOST_LAYERS
    return within and all(start >= 0 for start, _ in value or ())


def _is_size(value: Any) -> bool:
    return value is None or (type(value) is int and 1 <= value <= LARGEST_RANK)


SIZES = (
    *("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"),
    *("encoder_hidden_size", "encoder_num_layers", "num_tasks", "num_ranks"),
)

RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (_is_rank, f"a rank from 1 to {LARGEST_RANK:,}"),
    "rank_pattern": (lambda ranks: all(map(_is_rank, (ranks or {}).values())), f"ranks from 1 to {LARGEST_RANK:,}"),
    "lora_alpha": (is_number, "a number that float32 holds"),
    "alpha_pattern": (lambda alphas: all(map(is_number, (alphas or {}).values())), "numbers that float32 holds"),
    "reduction_factor": (_is_rank, f"a number from 1 to {LARGEST_RANK:,}"),
    "scaling": (lambda value: value is None or is_number(value), "a number that float32 holds"),
    "lora_dropout": (lambda p: 0 <= p < 1, "a probability of at least 0 and less than 1"),
    "trainable_token_indices": (_are_tokens, "tokens, 0 or more"),
    "token_indices": (_are_tokens, "tokens, 0 or more"),
    **dict.fromkeys(SIZES, (_is_size, f"a number from 1 to {LARGEST_RANK:,}")),
    "layer_replication": (_are_ranges, f"ranges of at most {MOST_LAYERS:,} layers together"),
}
"""What a config's value must be, beyond its type."""


def _check_header(file: Path, content: bytes) -> None:
    """A safetensors file is 8 bytes of length, a JSON header of that length, and the tensors' bytes, one behind the other without a gap."""
    size = len(content)
    length = int.from_bytes(content[:8], "little")
    if size < 8 or not 2 <= length <= min(size - 8, LARGEST_HEADER):
        got = f"a header of {length:,} bytes" if size >= 8 else "no length of a header"
        raise AdapterError(file, None, f"no safetensors file, or a part of one: {size:,} bytes, with {got}")
    try:
        header = reading.json_object(content[8 : 8 + length])
    except ValueError as error:
        raise AdapterError(file, None, str(error)) from error
    header.pop("__metadata__", None)
    end = 0
    for begin, stop, key in sorted((*_offsets(file, size, key, entry), key) for key, entry in header.items()):
        if begin != end:
            raise AdapterError(
                file, key, f"its bytes begin at {shown(begin)}, expected {end:,}, where the tensor before ends"
            )
        end = stop
    if end != size - 8 - length:
        raise AdapterError(
            file, None, f"expected {end:,} bytes of tensors, got {size - 8 - length:,}: cut off, or grown"
        )


def _offsets(file: Path, size: int, key: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's bytes begin and end, once its entry is known to make sense."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise AdapterError(file, key, f"expected dtype, shape and data_offsets, got {shown(entry)}")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        raise AdapterError(file, key, f"expected one of the dtypes {', '.join(DTYPES)}, got {shown(entry['dtype'])}")
    for name in ("shape", "data_offsets"):
        if not fits(entry[name], list[int]) or min(entry[name], default=0) < 0:
            raise AdapterError(file, key, f"{name}: expected numbers from 0, got {shown(entry[name])}")
    numbers, shape = entry["data_offsets"], entry["shape"]
    bytes_ = DTYPES[entry["dtype"]]
    for number in shape:
        if bytes_ > size:
            break  # before the product has more digits than Python prints
        bytes_ *= number
    if len(numbers) != 2 or numbers[1] - numbers[0] != bytes_:
        raise AdapterError(
            file, key, f"shape {shown(shape)} of {entry['dtype']} does not fill data_offsets {shown(numbers)}"
        )
    if not bytes_:
        raise AdapterError(file, key, f"shape {shown(shape)} has no elements")
    return numbers[0], numbers[1]


PIECE = 1 << 14


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor in pieces so small that torch works on one in the calling thread alone.

    A thread that reads beside another that computes must not have helpers of its own: with them there are more than the machine has cores, and
    GNU's OpenMP then lets everyone's doze between two operations, which costs the other a part of every step.
    """
    return tensor.reshape(-1).split(PIECE)


ENDS = re.compile(r"\.lora_(?:embedding_)?([AB])(?:\.weight)?$")  # of the keys of A [R, K] and B [N, R]


def _check_tensors(file: Path, config: Any, tensors: Mapping[str, Tensor]) -> None:
    """Finite values, of ranks that the config has, whose product float32 holds."""
    if not tensors:
        raise AdapterError(file, None, "holds no tensors")
    largest = {}
    for key, tensor in tensors.items():
        if ".lora_" in key and not tensor.is_floating_point():
            raise AdapterError(file, key, f"expected floating point, got {tensor.dtype}")
        ends = [one.item() for piece in pieces(tensor) for one in torch.aminmax(piece)]
        if not all(map(math.isfinite, ends)):
            raise AdapterError(file, key, "holds NaN or infinity")
        largest[key] = max(map(abs, ends))
    if config.peft_type != "LORA":
        return
    ranks = {config.r, *(config.rank_pattern or {}).values()}
    alpha = max(abs(value) for value in (config.lora_alpha, *(config.alpha_pattern or {}).values()))
    for key, tensor in tensors.items():
        end = ENDS.search(key)
        if not end:
            continue
        if tensor.dim() < 2:
            raise AdapterError(file, key, f"expected a matrix, got shape {list(tensor.shape)}")
        rank = tensor.shape[0 if end[1] == "A" else 1]
        # Under target_parameters the ranks of all experts stand below one another.
        known = any(rank % one == 0 for one in ranks) if config.target_parameters else rank in ranks
        if not known:
            raise AdapterError(
                file,
                key,
                f"shape {list(tensor.shape)} is of rank {rank}, {CONFIG} has {listed([str(one) for one in sorted(ranks)])}",
            )
        partner = key[: end.start(1)] + "AB"[end[1] == "A"] + key[end.end(1) :]
        if alpha * rank * largest[key] * largest.get(partner, 0.0) > torch.finfo(torch.float32).max:
            raise AdapterError(file, key, f"with {partner} and alpha {alpha} its update is more than float32 holds")


def ranks(adapter: Adapter) -> set[int]:
    """Those of its A and B; under target_parameters, of all experts together."""
    ends = [(ENDS.search(key), tensor) for key, tensor in adapter.tensors.items()]
    return {tensor.shape[0 if end[1] == "A" else 1] for end, tensor in ends if end}


def check(adapter: Adapter, model: nn.Module, *, allow_missing: bool = False) -> dict[str, Tensor]:
    """The adapter's tensors that belong on the model, once it is sure that they are the right ones; the model stays as it is.

    PEFT is asked: on a copy of the model without memory, it makes the adapter's layers and says under which keys it would save which shapes. PEFT
    also writes whole embeddings beside an adapter that has LoRA on one; those are no part of it, and are dropped where they are the model's own.

    Args:
        model: a transformers model, without adapters.
        allow_missing: a tensor that is not in the file is warned of, and not an error.

    Raises:
        AdapterError: the config does not fit the model, or a key is missing, unknown, or of another shape.
    """
    own = dict(model.named_parameters(remove_duplicate=False))
    return fitting(adapter, expect(adapter, model), own, allow_missing=allow_missing)


class Expected(NamedTuple):
    """What PEFT would save of an adapter of some config on some model."""

    tensors: dict[str, Tensor]  # on the meta device
    embeddings: set[str]  # keys of whole embeddings that it may write beside them
    model: Any  # the PeftModel, on the meta device


def fitting(
    adapter: Adapter, wanted: Expected, own: Mapping[str, Tensor], *, allow_missing: bool = False
) -> dict[str, Tensor]:
    """`check`, where it is known already what is expected. own: the model's weights by name."""
    file = adapter.folder / WEIGHTS
    expected, embeddings, empty_model = wanted
    given = dict(adapter.tensors)
    if given.keys() - expected.keys() - embeddings and adapter.config.peft_type == "LORA":
        given = _renamed(given, empty_model)
    for key in [key for key in given if key not in expected and key in embeddings]:
        name = WRAPPERS.sub("", key.removeprefix("base_model.model."))
        tensor, weight = given.pop(key), own.get(name)
        # The model's own, or what the model's own is, rounded.
        if weight is None or tensor.shape != weight.shape or not torch.equal(tensor.to(weight), weight.detach()):
            raise AdapterError(
                file, key, "an embedding of another base: it differs from the model's, which an adapter may not change"
            )
    unknown = sorted(given.keys() - expected.keys())
    missing = sorted(expected.keys() - given.keys())
    if unknown:
        hint = f"; missing are {listed(missing)}" if missing else ""
        raise AdapterError(
            file, None, f"{len(unknown)} keys that are none of this adapter's on this model: {listed(unknown)}{hint}"
        )
    for key, tensor in given.items():
        if tensor.is_floating_point() != expected[key].is_floating_point():
            raise AdapterError(file, key, f"got {tensor.dtype}, the model has room for {expected[key].dtype}")
        if tensor.shape != expected[key].shape:
            problem = f"got shape {list(tensor.shape)}, the model has room for {list(expected[key].shape)}"
            raise AdapterError(file, key, f"{problem}: was it trained on another base ({adapter.base})?")
    if missing:
        text = f"{len(missing)} of {len(expected)} tensors are missing: {listed(missing)}"
        if not allow_missing:
            raise AdapterError(file, None, f"{text} (allow_missing=True leaves them as PEFT begins)")
        logger.warning("adapter=%s: %s: %s", adapter.folder, file.name, text)
    return given


TRY = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for one in patterns:
    for name in names:
        re.fullmatch(one, name), re.match(rf"(.*\\.)?({one})$", name)
"""


def _check_patterns(adapter: Adapter, model: nn.Module) -> None:
    """Refuse a regular expression that does not come to an end on the model's names: in a process that can be stopped, as Python's own cannot."""
    names = [name for name, _ in model.named_modules()]
    for key in ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"):
        value = getattr(adapter.config, key, None) or ()
        if key.endswith("_modules") and not isinstance(value, str):
            continue  # names, not patterns
        patterns = [one for one in ([value] if isinstance(value, str) else value) if not re.fullmatch(r"[\w.-]+", one)]
        if not patterns:
            continue
        text, command = json.dumps([patterns, names]), [sys.executable, "-I", "-S", "-c", TRY]
        try:
            subprocess.run(command, input=text, text=True, stderr=subprocess.DEVNULL, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            problem = f"expected a regular expression that is matched in {PATIENCE:g} seconds, got {shown(patterns[0])}"
            raise AdapterError(adapter.folder / CONFIG, key, problem) from None


def without_memory(model: nn.Module) -> nn.Module:
    """A copy on the meta device, in which quantised linear layers are plain ones: their libraries know little of it, and adapters are as large."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear) and weight is not None and type(weight) is not nn.Parameter:
            dtype = weight.dtype if weight.is_floating_point() else None
            has_bias = module.bias is not None
            plain = nn.Linear(module.in_features, module.out_features, has_bias, device="meta", dtype=dtype)
            memo[id(module)] = plain.requires_grad_(False).train(module.training)
    for tensor in chain(model.parameters(), model.buffers()):
        if is_traceable_wrapper_subclass(tensor):  # torchao's, which know no meta device
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        else:
            empty = torch.empty_like(tensor, device="meta")
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, tensor.requires_grad)
        memo[id(tensor)] = empty
    return copy.deepcopy(model, memo)


def expect(adapter: Adapter, model: nn.Module) -> Expected:
    """What PEFT would save of the adapter on this model, which has none.

    Raises:
        AdapterError: PEFT cannot make them.
    """
    from peft import get_peft_model_state_dict

    _check_patterns(adapter, model)
    config = _without_beginning(adapter.config)
    # Of a prompt, PEFT would make what the config asks for before the file has shown that it holds as much.
    nowhere = torch.device("meta") if config.is_prompt_learning else nullcontext()
    with warnings.catch_warnings(), nowhere:
        warnings.simplefilter("ignore")  # PEFT says it again when the adapter is loaded
        try:
            empty_model = _with_adapter(without_memory(model), "default", config, low_cpu_mem_usage=True)
            expected = get_peft_model_state_dict(empty_model, save_embedding_layers=False)
            embeddings = get_peft_model_state_dict(empty_model, save_embedding_layers=True).keys() - expected.keys()
        except Exception as error:  # PEFT's, of any kind: re.error, KeyError, ...
            problem = f"PEFT cannot put it on {type(model).__name__}: {type(error).__name__}: {error}"
            raise AdapterError(adapter.folder / CONFIG, None, problem) from error
    _check_tokens(adapter, empty_model)
    return Expected(expected, embeddings, empty_model)


def _without_beginning(config: Any) -> Any:
    """A copy for a model whose values come from a file: how an adapter began (from the base's weights, a text, another file) changes no shape."""
    config = copy.deepcopy(config)
    begun = getattr(config, "init_lora_weights", None)
    if isinstance(begun, str) and begun != "mica":
        config.init_lora_weights = True
    if config.is_prompt_learning:
        config.inference_mode = True
    return config


def _renamed(tensors: dict[str, Tensor], empty_model: Any) -> dict[str, Tensor]:
    """Tensors that were saved under an older transformers, by the keys of today: it has moved the weights of some models, experts above all."""
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers as convert

    try:
        return convert(empty_model, empty_model.peft_config["default"], tensors)
    except Exception:  # its patterns meet keys that are nobody's: those are told as such
        return tensors


def _check_tokens(adapter: Adapter, empty_model: Any) -> None:
    from peft.utils.other import TrainableTokensWrapper

    for module in empty_model.modules():
        if isinstance(module, TrainableTokensWrapper):
            rows, tokens = module.original_module.weight.shape[0], module.token_adapter.token_indices["default"]
            if any(token >= rows for token in tokens):
                problem = f"expected tokens below {rows:,}, the rows of the model's embedding, got {max(tokens):,}"
                raise AdapterError(adapter.folder / CONFIG, "trainable_token_indices", problem)


def _changes_something(adapter: Adapter, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Whether a model computes anything else with these tensors than without: told by them and the model's own weights, before it has them.

    What is not known to change nothing changes something.
    """
    config = adapter.config
    alphas = [getattr(config, "lora_alpha", 1), *(getattr(config, "alpha_pattern", None) or {}).values()]

    def changes(key: str, tensor: Tensor) -> bool:
        if end := ENDS.search(key):
            other = tensors.get(key[: end.start(1)] + "AB"[end[1] == "A"] + key[end.end(1) :])
            return any(alphas) and _any(tensor) and (other is None or _any(other))
        if ".lora_magnitude_vector" in key:
            return _scales(tensor, own.get(_base_name(key.partition(".lora_magnitude_vector")[0] + ".weight")))
        if key.endswith("lora_B.bias"):
            return any(alphas) and _any(tensor)
        if key.endswith(".ia3_l"):
            return bool((tensor != 1).any())
        at, token_rows, _ = key.partition(".trainable_tokens_delta")
        at = _base_name(at.removesuffix(".token_adapter").replace(".ln_tuning_layers", ""))
        weight: Any = own.get(f"{at}.weight" if token_rows else at)
        tokens = _tokens_of(config, at) if token_rows else None
        if weight is not None and tokens is not None:
            weight = weight.detach()[tokens]
        same = weight is not None and weight.shape == tensor.shape and not weight.is_meta
        return not (same and torch.equal(tensor.to(weight), weight.detach()))

    return any(changes(key, tensor) for key, tensor in tensors.items())


def _any(tensor: Tensor) -> bool:
    return any(bool(piece.any()) for piece in pieces(tensor))


def _base_name(key: str) -> str:
    return WRAPPERS.sub("", key.removeprefix("base_model.model."))


def _scales(magnitude: Tensor, weight: Tensor | None) -> bool:
    """Whether a DoRA's magnitudes differ from the norms of W's rows or, as Conv1D has it, columns by more than their rounding."""
    if weight is None or weight.is_meta or weight.dim() != 2 or not weight.is_floating_point():
        return True
    short = any(one.dtype.itemsize == 2 for one in (magnitude, weight))
    norms = [torch.linalg.vector_norm(weight.detach().float(), dim=dim).cpu() for dim in (0, 1)]
    tolerance = 1e-2 if short else 1e-5
    return not any(
        norm.shape == magnitude.flatten().shape and torch.allclose(magnitude.flatten().float(), norm, rtol=tolerance)
        for norm in norms
    )


def _tokens_of(config: Any, layer: str) -> list[int] | None:
    """The tokens of an embedding whose rows an adapter has."""
    tokens = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None)
    if isinstance(tokens, dict):
        return next((own for name, own in tokens.items() if f".{layer}".endswith(f".{name}")), None)
    return tokens


def require_name(name: str) -> None:
    """Raise ValueError where an adapter cannot be called so: PEFT keeps adapters by name among a module's children."""
    if not name or "." in name or name == BASE:
        raise ValueError(f"adapter name {name!r}: expected a name without dots other than {BASE}")
    if hasattr(nn.ModuleDict, name) or hasattr(nn.ParameterDict, name):
        raise ValueError(f"adapter name {name!r}: torch's modules have something of that name, expected another one")


def load(
    model: Any,
    adapters: Mapping[str, Adapter],
    *,
    is_trainable: bool = False,
    allow_missing: bool = False,
    allow_noop: bool = False,
) -> Any:
    """The model with the adapters on it, as a PeftModel; the first is the active one.

    Args:
        model: a transformers model without adapters; it is changed only when all of them fit.
        adapters: by adapter name.
        is_trainable: for training, in place of use.
        allow_missing: tensors that are not in the file are as PEFT begins.
        allow_noop: take also an adapter that changes nothing, as one whose B are all zero; it may always be trained on.

    Raises:
        AdapterError: as `check`; or an adapter changes nothing; or one of several adapters is of another method, or one that changes the base under
            the others; or is_trainable, and the file holds what a prompt's encoder gave, not the encoder.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    first = next(iter(adapters.values()))
    for adapter in adapters.values():
        config = adapter.config
        if len(adapters) > 1:
            require_an_untouched_base(adapter)
        if config.peft_type != first.config.peft_type:
            problem = f"expected {first.config.peft_type.value}, as the first adapter's, got {config.peft_type.value}"
            raise AdapterError(adapter.folder / CONFIG, "peft_type", problem)
        if (
            is_trainable
            and config.is_prompt_learning
            and (config.peft_type == "P_TUNING" or getattr(config, "prefix_projection", False))
        ):
            problem = "its encoder is not in the file: it can be used, but not trained on"
            raise AdapterError(adapter.folder / CONFIG, "peft_type", problem)
    checked = {name: check(adapter, model, allow_missing=allow_missing) for name, adapter in adapters.items()}
    if not (allow_noop or is_trainable):
        own = dict(model.named_parameters(remove_duplicate=False))
        for name, tensors in checked.items():
            require_a_change(adapters[name], tensors, own)
    sources: dict[str, receipts.Source] = {}
    for name, tensors in checked.items():
        config = copy.deepcopy(adapters[name].config)
        config.inference_mode = not is_trainable
        if config.is_prompt_learning and is_trainable and hasattr(config, "prompt_tuning_init"):
            config.prompt_tuning_init = "RANDOM"  # its values are in the file
        model = _with_adapter(model, name, config)
        missing: set[str] = set()
        given = set(adapters[name].tensors) - tensors.keys()
        if allow_missing:  # PEFT wants every tensor of modules_to_save: what is missing stays as it has begun
            begun = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
            missing = begun.keys() - tensors.keys()
            tensors = {**begun, **tensors}
        set_peft_model_state_dict(model, tensors, adapter_name=name)
        read = adapters[name]
        sources[name] = receipts.Source(str(read.folder), read.hashes, tuple(sorted(given)), tuple(sorted(missing)))
    for name, source in sources.items():
        receipts.note(model, name, source)
    return model


def require_a_change(adapter: Adapter, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raise AdapterError where a model with these weights of its own computes the same with the adapter's tensors as without."""
    if not _changes_something(adapter, tensors, own):
        problem = "changes nothing: with it the model computes what it does without (allow_noop=True takes it)"
        raise AdapterError(adapter.folder / WEIGHTS, None, problem)


def require_an_untouched_base(adapter: Adapter) -> None:
    """Refuse, beside others, an adapter that PEFT makes by writing into the base: theirs would no longer be the one they were trained on."""
    config = adapter.config
    if config.peft_type != "LORA":
        return
    begun = config.init_lora_weights if isinstance(config.init_lora_weights, str) else ""
    found = {
        "bias": config.bias != "none",
        "init_lora_weights": begun.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")),
        "kasa_config": getattr(config, "kasa_config", None) is not None,
        "layer_replication": config.layer_replication is not None,
    }
    for key in [key for key, writes in found.items() if writes]:
        problem = f"{shown(getattr(config, key))} changes the base itself: expected no other adapter on the same model"
        raise AdapterError(adapter.folder / CONFIG, key, problem)


def _with_adapter(model: Any, name: str, config: Any, **options: Any) -> Any:
    """PEFT's own layers for a config, before any values."""
    from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel

    if isinstance(model, PeftModel):
        model.add_adapter(name, config, **options)
        return model
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type, PeftModel)(model, config, name, **options)
