"""PEFT's soft prompts in any batch, each row as if it were alone: the class that `accelerate` swaps a PeftModel to.

A causal model's prompt runs once for all rows that have it (sharing.py), or at inference once for all calls: what it leaves in each layer is
kept until the prompt or the model is another. Prefixes, which are keys and values, take the same ways. T5 and BERT, where a prompt sees the
input, have it in each row (operators/prefix_concat.py). Parameters, adapters and files remain PEFT's.
"""

import functools
import inspect
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    PeftType,
)
from torch import Tensor, nn
from transformers import DynamicCache

from fastlora import ops, sharing, trees
from fastlora.layers import BASE
from fastlora.operators.prefix_concat import Prefixed, prefix_concat
from fastlora.peft import grouped
from fastlora.sharing import APART, MASK, Keys
from fastlora.swap import become, derive, undo
from fastlora.trees import IGNORE, Root, Rows

KEY = "_fastlora_prompts"
"""Under which a PeftModel's `__dict__` has its State, and a cache's what stands before its rows."""
EMBEDDED = (PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.MULTITASK_PROMPT_TUNING)
KEYED = (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE)
_fingerprint = ops.native("fingerprint_cpu")


class Kept(NamedTuple):
    """What a prompt left in a model's layers."""

    prompt: Tensor  # [P, D], as it was
    model: tuple[Any, ...]  # the model, as it was
    keys: Keys


@dataclass
class State(sharing.State):
    kept: dict[tuple[str, int], Kept] = field(default_factory=dict)  # by adapter and task


class Prompts(NamedTuple):
    """The prompts of a batch, each once."""

    lengths: list[int]
    of: list[int]  # of each row the number of its own, or -1
    embedded: list[Tensor]  # [P, D] each; empty where they are keys and values
    keys: list[Keys]  # as long, or empty
    names: list[tuple[str, int]]  # adapter and task

    def roots(self) -> list[Root]:
        firsts = torch.tensor([0, *self.lengths]).cumsum(0).tolist()
        return [Root(length, first) for length, first in zip(self.lengths, firsts, strict=False)]


def is_prompted(module: Any) -> bool:
    """Whether it is a PeftModel with a soft prompt."""
    return isinstance(module, PeftModel) and any(_is_known(config) for config in module.peft_config.values())


def _is_known(config: Any) -> bool:
    return config.peft_type in (*EMBEDDED, *KEYED)


def attach(model: Any) -> None:
    """Swap the class of a PeftModel with soft prompts.

    Warns:
        UserWarning: the model is of a class that is left to PEFT, or a prompt has rows that PEFT never uses.
    """
    kind: Any = type(model)
    if kind in FORWARDS:
        become(model, with_prompts(kind))
        model.__dict__[KEY] = State()
    elif KEY not in model.__dict__:  # nor swapped before
        warnings.warn(f"fastlora.accelerate leaves the prompts of a {kind.__name__} to PEFT", stacklevel=3)
    for name, config in model.peft_config.items():
        twice = isinstance(model, PeftModelForSeq2SeqLM) and config.num_transformer_submodules == 2
        if twice and config.peft_type in (PeftType.PROMPT_TUNING, PeftType.P_TUNING):
            P = config.num_virtual_tokens
            warnings.warn(
                f"adapter {name!r} has {2 * P} rows, of which PEFT uses {P}, before the encoder's input; the others are never trained: "
                "num_transformer_submodules=1 in its config leaves them out",
                stacklevel=3,
            )


def detach(module: nn.Module) -> None:
    """Give a PeftModel its class back, if it was swapped."""
    if module.__dict__.pop(KEY, None) is not None:
        undo(module)


@functools.cache
def with_prompts(plain: Any) -> type:
    """The class derived from a PeftModel's."""
    names = [name for name in inspect.signature(plain.forward).parameters if name not in ("self", "kwargs")]

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__.get(KEY)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        if state is None or not _is_ours(self):
            return plain.forward(self, **given)
        return FORWARDS[plain](self, plain, state, {name: one for name, one in given.items() if one is not None})

    methods: dict[str, Any] = {"forward": forward}
    if plain is PeftModelForCausalLM:
        methods |= {"generate": _generating(plain), "prepare_inputs_for_generation": _preparing(plain)}
    elif plain is PeftModelForSeq2SeqLM:
        methods["generate"] = _generating_seq2seq(plain)
    return derive(plain, with_prompts, **methods)


def _is_ours(model: Any) -> bool:
    """Whether its adapters are prompts: PEFT has but one kind in a model."""
    return _is_known(model.active_peft_config)


def find_prompts(model: Any, count: int, names: Sequence[str] | None, tasks: Tensor | None) -> Prompts:
    """The prompts of a batch of so many rows.

    names: of each row its adapter's, `__base__` for none; tasks: [count], of multitask prompts.

    Raises:
        ValueError: there are more or fewer names or tasks than rows, a name is not an adapter's, or a prompt wants tasks and there are none.
    """
    names = _named(model, names, count)
    if tasks is not None and len(tasks) != count:
        raise ValueError(f"task_ids: got {len(tasks)}, expected one for each of {count} rows")
    kinds = {name: model.peft_config[name].peft_type for name in names if name != BASE}
    numbers = [0] * count if tasks is None else tasks.tolist()
    pairs = [
        (name, number if kinds.get(name) == PeftType.MULTITASK_PROMPT_TUNING else 0)
        for name, number in zip(names, numbers, strict=True)
    ]
    found = [pair for pair in dict.fromkeys(pairs) if pair[0] != BASE]
    embedded, keys = [], []
    for name, number in found:
        if kinds[name] == PeftType.MULTITASK_PROMPT_TUNING and tasks is None:
            raise ValueError(
                f"task_ids: got None, expected the tasks of the batch's rows, as adapter {name!r} has many"
            )
        value = _as_if_active(model, name).get_prompt(1, task_ids=torch.tensor([number], device=model.device))
        if kinds[name] in KEYED:
            keys.append(sharing.keys_of(value))
        else:
            embedded.append(value[0][: model.peft_config[name].num_virtual_tokens])
    lengths = [model.peft_config[name].num_virtual_tokens for name, _ in found]
    places = {pair: i for i, pair in enumerate(found)}
    return Prompts(lengths, [places.get(pair, -1) for pair in pairs], embedded, keys, found)


def _require_known(model: Any, names: Sequence[str]) -> None:
    """
    Raises:
        ValueError: a name is not an adapter's.
    """
    unknown = {*names} - {BASE, *model.peft_config}
    if unknown:
        raise ValueError(f"adapter_names: got {sorted(unknown)}, expected some of {[BASE, *model.peft_config]}")


def _named(model: Any, names: Sequence[str] | None, count: int) -> list[str]:
    """Of each row its adapter's name.

    Raises:
        ValueError: a name is not an adapter's, or there are more or fewer than rows.
    """
    names = [model.active_adapter] * count if names is None else list(names)
    _require_known(model, names)
    if len(names) != count:
        raise ValueError(f"adapter_names: got {len(names)}, expected one for each of {count} rows")
    return names


def ensemble(model: Any, adapter_names: Sequence[str], **given: Tensor) -> Tensor:  # [B, T, V]
    """The logarithms of the mean probabilities under several prompts for one task, each row once under each, in one batch.

    (Lester et al. 2021, section 6, lets the prompts vote on answers; the mean also tells them apart where they disagree.)

    given: input_ids or inputs_embeds, attention_mask, position_ids; a batch's rows each.

    Raises:
        ValueError: adapter_names is empty, or names what is no adapter.
    """
    if not adapter_names:
        raise ValueError(f"adapter_names: got {adapter_names!r}, expected at least one")
    count = len(adapter_names)
    repeated = {name: value.repeat(count, *(1,) * (value.dim() - 1)) for name, value in given.items()}
    rows = next(iter(given.values())).shape[0]
    logits = model(**repeated, adapter_names=[name for name in adapter_names for _ in range(rows)]).logits
    of_each: Tensor = logits.unflatten(0, (count, rows)).log_softmax(-1)
    return of_each.logsumexp(0) - math.log(count)


def _as_if_active(model: Any, name: str) -> Any:
    """The model, but for its active adapter; nothing is written into the model."""
    if name == model.active_adapter:
        return model
    twin = object.__new__(type(model))
    twin.__dict__.update(model.__dict__, active_adapter=name)
    return twin


def _stamp(base: nn.Module) -> tuple[Any, ...]:
    """What a model's layers leave of a prompt depends on, as far as one can see without reading all of the weights."""
    cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    return (base.training, cast, *(_version(one) for one in base.parameters()))


def _version(weight: Tensor) -> tuple[int, ...]:
    version = -1 if weight.is_inference() else weight._version
    looked_at = _fingerprint is not None and type(weight) is nn.Parameter and weight.is_cpu and weight.dim() == 2
    looked_at = looked_at and weight.dtype in ops.KERNEL_DTYPES
    return weight.data_ptr(), version, _fingerprint(weight.detach()) if looked_at else 0


@torch.no_grad()
def kept_keys(model: Any, state: State, found: Prompts) -> list[Keys]:
    """What each prompt leaves in the model's layers, computed where that is not known of this prompt and this model."""
    if found.keys:
        return found.keys
    stamp = _stamp(model.base_model)
    keys = []
    for name, prompt in zip(found.names, found.embedded, strict=True):
        kept = state.kept.get(name)
        if kept is None or kept.model != stamp or not _same(kept.prompt, prompt):
            more = {"logits_to_keep": 1} if "logits_to_keep" in _parameters(model.base_model) else {}
            embedded = prompt.to(model.word_embeddings.weight.dtype)[None]
            out = model.base_model(inputs_embeds=embedded, past_key_values=DynamicCache(), use_cache=True, **more)
            kept = Kept(prompt.clone(), stamp, sharing.keys_of(out.past_key_values))
            state.kept[name] = kept
        keys.append(kept.keys)
    return keys


def kept_bytes(model: Any, config: Any) -> int:
    """What `kept_keys` keeps of a prompt of that configuration once it has run; keys and values that a file holds are not kept."""
    if config.peft_type not in EMBEDDED:
        return 0
    sizes, P = model.get_base_model().config.get_text_config(), int(config.num_virtual_tokens)
    heads = int(getattr(sizes, "num_key_value_heads", None) or sizes.num_attention_heads)
    width = int(getattr(sizes, "head_dim", None) or sizes.hidden_size // sizes.num_attention_heads)
    weight: Tensor = model.word_embeddings.weight
    prompt = P * weight.shape[1] * torch.float32.itemsize
    return prompt + 2 * int(sizes.num_hidden_layers) * P * heads * width * weight.dtype.itemsize


def forget(model: Any, name: str) -> None:
    """Let go of what an adapter's prompts left in the model's layers."""
    state: State | None = model.__dict__.get(KEY)
    kept = {} if state is None else state.kept
    for key in [key for key in kept if key[0] == name]:
        kept.pop(key, None)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)


def _parameters(base: Any) -> Mapping[str, Any]:
    return inspect.signature(base.forward).parameters


def _causal(model: Any, plain: Any, state: State, given: dict[str, Any]) -> Any:
    """A causal language model's output for a batch, with the logits of its own tokens only: [B, T, V]."""
    past = given.get("past_key_values")
    if given.get("input_ids") is None and given.get("inputs_embeds") is None:
        raise ValueError("input_ids: got None, expected the batch's tokens, or inputs_embeds")
    if past is not None and KEY not in past.__dict__:
        state.last = APART, "PEFT's own forward: past_key_values was given"
        return plain.forward(model, **given)
    names, tasks = given.pop("adapter_names", None), given.pop("task_ids", None)
    as_tuple = given.pop("return_dict", True) is False
    out = _continue(model, given, past) if past is not None else _begin(model, state, given, names, tasks)
    return out.to_tuple() if as_tuple else out


class Batch:
    """What a model's forward is given."""

    def __init__(self, model: Any, given: dict[str, Any]) -> None:
        self.given = given
        self.embeds = given.get("inputs_embeds")
        self.tokens: Tensor = given["input_ids"] if self.embeds is None else self.embeds  # [B, T] or [B, T, D]
        self.shape, self.device = self.tokens.shape[:2], self.tokens.device
        mask = given.get("attention_mask")
        if mask is not None and mask.shape != self.shape:
            raise ValueError(f"attention_mask: got shape {list(mask.shape)}, expected {list(self.shape)}")
        self.real = torch.ones(self.shape, dtype=torch.bool, device=self.device) if mask is None else mask != 0
        self.rows = trees.find_rows(self.real, given.get("position_ids"))
        self.embedding = model.word_embeddings

    def rest(self, *taken: str) -> dict[str, Any]:
        """What is given beside tokens, mask, positions and labels."""
        return {name: value for name, value in self.given.items() if name not in (*GIVEN_ANEW, *taken)}

    def predicts_first(self) -> bool:
        """Whether some row's first token has a label, which the prompt's last row is to predict."""
        labels = self.given.get("labels")
        if labels is None or self.given.get("shift_labels") is not None:
            return False
        firsts = self.rows.tokens[self.rows.bounds[:-1]].to(labels.device)
        return bool((labels.flatten()[firsts] != IGNORE).any())


LAID_OUT = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "labels", "shift_labels", "token_type_ids")
"""What has a value for each token."""
GIVEN_ANEW = (*LAID_OUT, *sharing.BOUNDS)


def _begin(model: Any, state: State, given: dict[str, Any], names: Any, tasks: Any) -> Any:
    base = model.base_model
    batch = Batch(model, given)
    found = find_prompts(model, batch.shape[0], names, tasks)
    inferring = not torch.is_grad_enabled() and not base.training
    obstacle = sharing.call_obstacle(base, given)
    if obstacle is not None:
        in_cache = inferring and given.get("use_cache") and batch.rows.texts == batch.shape[0]
        if not in_cache or torch.compiler.is_compiling():
            return _apart(model, state, batch, found, obstacle)
        state.last = APART, "each row's cache begins with its prompt's keys and values, kept"
        return _cached(model, batch, found, kept_keys(model, state, found))
    way, keys_only = _choose(state, base, batch, found, inferring)
    if way == APART:
        return _apart(model, state, batch, found, "the model's logits are others where rows share a prompt")
    last_apart = not found.keys and batch.predicts_first()
    root_of = [found.of[row] for row in batch.rows.batch_rows(batch.shape[1])]
    shares = sharing.KEY in base.__dict__ and batch.embeds is None
    tree = trees.grow(
        batch.rows,
        batch.shape,
        found.roots(),
        root_of,
        keys_only=keys_only,
        last_apart=last_apart,
        ids=batch.tokens if shares else None,
        targets=sharing.targets_of(given),
        device=batch.device,
    )
    if sharing.too_long(base, tree):
        return _apart(model, state, batch, found, f"some layer sees {sharing.window_of(base)} tokens")
    keys = None
    if keys_only and found.lengths:
        keys = _in_a_row(kept_keys(model, state, found), [length - last_apart for length in found.lengths])
    embedded = tree.gather(batch.tokens, 0)
    if batch.embeds is None:
        embedded = batch.embedding(embedded)
    if found.embedded:
        embedded = sharing.with_prompts(tree, embedded, torch.cat(found.embedded))
    row = {
        "inputs_embeds": embedded,
        **sharing.arguments(tree, way, embedded.dtype, keys),
        **sharing.labelled(given, tree),
    }
    state.last = way, _told(found, tree, keys_only)
    rest = batch.rest("logits_to_keep")
    kept = given.get("logits_to_keep", 0)
    return sharing.run(base, {**rest, **row}, tree, kept, "logits_to_keep" in _parameters(base))


def _choose(state: State, base: Any, batch: Batch, found: Prompts, inferring: bool) -> tuple[str, bool]:
    """The way, and whether the prompts are given as keys and values."""
    for keys_only in (True,) if found.keys else (True, False) if inferring else (False,):
        way = sharing.find_way(state, base, base, batch.embedding, keys_only=keys_only)
        dropped = way == MASK and keys_only and sharing.checkpoints(base)  # with the cache
        if way != APART and not dropped:
            return way, keys_only
    return APART, bool(found.keys)


def _told(found: Prompts, tree: trees.Tree, keys_only: bool) -> str:
    kind = "prefix" if found.keys else "prompt"
    how = "given as keys and values" if keys_only else "run once for all rows"
    count = len(found.lengths)
    return f"{count} {kind}{'es' * bool(found.keys and count != 1)}{'s' * (not found.keys and count != 1)}, {how}; {len(tree.source)} tokens run"


def _in_a_row(keys: Sequence[Keys], lengths: Sequence[int]) -> Keys:
    """Of each layer so many rows of each prompt's keys and values, one prompt after the other."""
    found = []
    for layer in zip(*keys, strict=True):
        key, value = (
            torch.cat([side[:, :, :length] for side, length in zip(sides, lengths, strict=True)], 2)
            for sides in zip(*layer, strict=True)
        )
        found.append((key, value))
    return found


class Before(NamedTuple):
    """What a cache begins with."""

    lengths: Tensor  # [B], of the rows' prompts
    mask: Tensor  # bool [B, longest]: a shorter one stands at the right


def _before(found: Prompts, device: Any) -> Before:
    lengths = torch.tensor([found.lengths[i] if i >= 0 else 0 for i in found.of], device=device)
    longest = max(found.lengths, default=0)
    return Before(lengths, torch.arange(longest, device=device) >= longest - lengths[:, None])


def _fill(cache: DynamicCache, found: Prompts, keys: Sequence[Keys], before: Before) -> None:
    """Let an empty cache begin with each row's prompt."""
    longest = before.mask.shape[1]
    for number, layer in enumerate(zip(*keys, strict=True)):
        sides = []
        for one in zip(*layer, strict=True):  # the keys of all prompts, then their values
            wide = [nn.functional.pad(side, (0, 0, longest - side.shape[2], 0)) for side in one]
            if len(wide) == 1 and -1 not in found.of:
                sides.append(wide[0].expand(len(found.of), -1, -1, -1))
            else:
                sides.append(torch.cat([*wide, torch.zeros_like(wide[0])])[found.of])  # the last for rows without
        key, value = sides
        cache.update(key, value, number)
    cache.__dict__[KEY] = before


def _cached(model: Any, batch: Batch, found: Prompts, keys: Sequence[Keys]) -> Any:
    """The rows, their prompts in a cache."""
    before = _before(found, batch.device)
    cache = DynamicCache()
    _fill(cache, found, keys, before)
    positions = batch.given.get("position_ids")
    positions = batch.real.cumsum(1) - 1 if positions is None else positions
    given = {**batch.given, "attention_mask": torch.cat((before.mask, batch.real), 1).long(), "past_key_values": cache}
    if "position_ids" in _parameters(model.base_model):
        given["position_ids"] = (positions + before.lengths[:, None]).clamp(min=0)
    return model.base_model(**given)


def _continue(model: Any, given: dict[str, Any], past: Any) -> Any:
    """More tokens after those in a cache that begins with prompts. The mask, if any, is of the cache's tokens as well."""
    before: Before = past.__dict__[KEY]
    tokens = given["input_ids"] if given.get("inputs_embeds") is None else given["inputs_embeds"]
    B, T = tokens.shape[:2]
    total = past.get_seq_length() - before.mask.shape[1] + T
    mask = given.get("attention_mask")
    if mask is None:
        mask = torch.ones(B, total, dtype=torch.long, device=tokens.device)
    if mask.shape != (B, total):
        raise ValueError(
            f"attention_mask: got shape {list(mask.shape)}, expected {[B, total]}, the cache's tokens first"
        )
    positions = given.get("position_ids")
    positions = ((mask != 0).cumsum(1) - 1)[:, -T:] if positions is None else positions
    given = {**given, "attention_mask": torch.cat((before.mask, mask != 0), 1).long()}
    if "position_ids" in _parameters(model.base_model):
        given["position_ids"] = (positions + before.lengths[:, None]).clamp(min=0)
    return model.base_model(**given)


class Apart:
    """A batch's rows with a row of a new batch for each, the padding at the right, or at the left."""

    def __init__(self, batch: Batch, rows: Rows, left: bool = False) -> None:
        lengths = torch.tensor(rows.bounds).diff()
        self.count, self.width = rows.texts, int(lengths.max())
        self.row = torch.repeat_interleave(torch.arange(self.count), lengths).to(batch.device)
        place = torch.arange(len(rows.tokens)) - torch.tensor(rows.bounds[:-1]).repeat_interleave(lengths)
        self.column = (place + (self.width - lengths).repeat_interleave(lengths) * left).to(batch.device)
        self.tokens, self.shape = rows.tokens.to(batch.device), batch.shape
        self.of = rows.batch_rows(batch.shape[1])

    def spread(self, values: Tensor, fill: Any = 0, before: int = 0) -> Tensor:
        """values [B, T, ...] as [rows, before + width, ...]; before: columns in front of a batch that is padded at the left."""
        out = values.new_full((self.count, before + self.width, *values.shape[2:]), fill)
        out[self.row, before + self.column] = values.flatten(0, 1)[self.tokens]
        return out

    def gather(self, values: Tensor, shift: Tensor) -> Tensor:
        """What `spread` began with, of values [rows, columns, ...]; shift: [rows], how much further right a row lies."""
        out = values.new_zeros(self.shape[0] * self.shape[1], *values.shape[2:])
        out = out.index_copy(0, self.tokens, values[self.row, self.column + shift[self.row]])
        return out.unflatten(0, self.shape)


def _apart(model: Any, state: State, batch: Batch, found: Prompts, reason: str) -> Any:
    """A causal model's output with each row's prompt for itself."""
    base = model.base_model
    state.last = APART, f"each row has its prompt for itself: {reason}"
    if found.keys and sharing.checkpoints(base):
        raise ValueError(
            "gradient_checkpointing: a prefix needs a cache where the model's attention is not torch's, and checkpointing drops it; "
            "turn it off, or load the model with attn_implementation='sdpa'"
        )
    apart = Apart(batch, batch.rows)
    found = found._replace(of=[found.of[row] for row in apart.of])
    given = {"use_cache": False, **batch.rest("logits_to_keep")}
    real = apart.spread(torch.ones_like(batch.real))
    positions = batch.given.get("position_ids")
    if found.keys:
        laid = {"input_ids" if batch.embeds is None else "inputs_embeds": apart.spread(batch.tokens)}
        for name, fill in (("labels", IGNORE), ("shift_labels", IGNORE), ("position_ids", 0)):
            if name in batch.given:
                laid[name] = apart.spread(batch.given[name].expand(batch.shape), fill)
        inner = Batch(model, {**given, **laid, "attention_mask": real.long()})
        shift = torch.zeros(apart.count, dtype=torch.long, device=batch.device)
        out = _cached(model, inner, found, found.keys)
    else:
        labels = batch.given.get("labels")
        labels = None if labels is None else apart.spread(labels, IGNORE)
        positions = None if positions is None else apart.spread(positions.expand(batch.shape))
        rows = _concatenate(model, batch, apart, found, real, labels, positions)
        shift = _before(found, batch.device).lengths
        given |= {"inputs_embeds": rows.embeds, "attention_mask": rows.attention_mask, "labels": rows.labels}
        if "position_ids" in _parameters(base):
            given["position_ids"] = rows.position_ids
        if "shift_labels" in batch.given:
            wide = torch.full_like(rows.position_ids, IGNORE)
            wide[apart.row, apart.column + shift[apart.row]] = batch.given["shift_labels"].flatten()[apart.tokens]
            given["shift_labels"] = wide
        out = base(**given)
    if not given["use_cache"] and "past_key_values" in out:
        out = type(out)(**{**out, "past_key_values": None})
    if out.get("logits") is None:
        return out
    kept = batch.given.get("logits_to_keep", 0)
    logits = apart.gather(out.logits, shift)
    return type(out)(**{**out, "logits": logits[:, sharing.columns(kept)]})


def _concatenate(
    model: Any,
    batch: Batch,
    apart: Apart,
    found: Prompts,
    real: Tensor,
    labels: Tensor | None = None,
    positions: Tensor | None = None,
) -> Prefixed:
    """The rows with their prompts in front."""
    tokens = apart.spread(batch.tokens)
    embeds = batch.embedding(tokens) if batch.embeds is None else tokens
    each = [prompt.to(embeds.dtype) for prompt in found.embedded]
    if -1 in found.of:
        each.append(embeds.new_zeros(0, embeds.shape[-1]))
    index = torch.tensor([i if i >= 0 else len(each) - 1 for i in found.of], device=batch.device)
    return prefix_concat(each, embeds, real.long(), prompt_index=index, labels=labels, position_ids=positions)


def _generating(plain: Any) -> Any:
    @functools.wraps(plain.generate)
    def generate(self: Any, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Any:
        if adapter_names is None:
            return plain.generate(self, *args, **kwargs)
        if KEY not in self.__dict__ or not _is_ours(self):
            return plain.generate(self, *args, adapter_names=adapter_names, **kwargs)
        _require_known(self, adapter_names)
        known = [*self.peft_config]
        index = [known.index(name) if name != BASE else -1 for name in adapter_names]
        return plain.generate(self, *args, prompt_index=torch.tensor(index, device=self.device), **kwargs)

    return generate


def _preparing(plain: Any) -> Any:
    def prepare_inputs_for_generation(
        self: Any,
        input_ids: Tensor,
        *args: Any,
        task_ids: Tensor | None = None,
        prompt_index: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """What a step of generation runs: at the first, a cache that begins with the prompts' keys and values.

        prompt_index: [B], of each row its adapter's number among all, or -1.
        """
        state, cache = self.__dict__.get(KEY), kwargs.get("past_key_values")
        names = None if prompt_index is None else [[*self.peft_config, BASE][i] for i in prompt_index.tolist()]
        plainly = kwargs.get("inputs_embeds") is not None or (cache is not None and type(cache) is not DynamicCache)
        if state is None or plainly or not _is_ours(self):
            return plain.prepare_inputs_for_generation(self, input_ids, *args, task_ids=task_ids, **kwargs)
        base_prepare, mask = self.base_model_prepare_inputs_for_generation, kwargs.get("attention_mask")
        if cache is None or kwargs.get("use_cache") is False:
            cache = kwargs["past_key_values"] = DynamicCache()  # of this step alone
        if KEY not in cache.__dict__:
            found = find_prompts(self, len(input_ids), names, task_ids)
            _fill(cache, found, kept_keys(self, state, found), _before(found, input_ids.device))
        before: Before = cache.__dict__[KEY]
        if kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") is not None:
            # A cache that an earlier call has returned: what generate takes for cached tokens are prompts' rows, too.
            kwargs["next_sequence_length"] += before.mask.shape[1]
        if mask is not None:
            kwargs["attention_mask"] = torch.cat((before.mask.to(mask.dtype), mask), 1)
        elif not bool(before.mask.all()):
            seen = torch.ones(before.mask.shape[0], input_ids.shape[1], dtype=torch.bool, device=input_ids.device)
            kwargs["attention_mask"] = torch.cat((before.mask, seen), 1).long()
        if kwargs.get("position_ids") is not None:
            kwargs["position_ids"] = kwargs["position_ids"] + before.lengths[:, None]
        return base_prepare(input_ids, *args, **kwargs)

    return prepare_inputs_for_generation


def _generating_seq2seq(plain: Any) -> Any:
    @functools.wraps(plain.generate)
    def generate(self: Any, **kwargs: Any) -> Any:
        if KEY not in self.__dict__ or not _is_ours(self) or kwargs.get("input_ids") is None:
            return plain.generate(self, **kwargs)
        names, tasks = kwargs.pop("adapter_names", None), kwargs.get("task_ids")
        batch = Batch(self, {name: kwargs[name] for name in LAID_OUT if kwargs.get(name) is not None})
        apart = Apart(batch, trees.find_rows(batch.real, None))
        rest = {name: value for name, value in kwargs.items() if name not in LAID_OUT}
        names = _named(self, names, batch.shape[0])
        if any(_stands_elsewhere(self, name) for name in names):
            given = {**_without_gaps(self, batch, apart), **rest}
            if {*names} == {self.active_adapter}:
                return plain.generate(self, **given)
            return grouped.generate(functools.partial(_generate_alone, self, plain), given, names, _pad(self))
        found = find_prompts(self, batch.shape[0], names, tasks)
        rows = _concatenate(self, batch, apart, found, apart.spread(torch.ones_like(batch.real)))
        rest.pop("task_ids", None)
        return self.base_model.generate(inputs_embeds=rows.embeds, attention_mask=rows.attention_mask, **rest)

    return generate


def _generate_alone(model: Any, plain: Any, name: str, given: dict[str, Any]) -> Tensor:
    """The answers of rows of one adapter."""
    if name == BASE:
        answers: Tensor = model.base_model.generate(**_of_the_base(given))
    else:
        answers = plain.generate(_as_if_active(model, name), **given)
    return answers


def _of_the_base(given: dict[str, Any]) -> dict[str, Any]:
    """What a model without prompts is given."""
    return {name: value for name, value in given.items() if name != "task_ids"}


def _stands_elsewhere(model: Any, name: str) -> bool:
    """Whether a prompt does not stand before an encoder's input, or not there alone: a prefix, and what has a half before the decoder's input."""
    if name == BASE:
        return False
    config = model.peft_config[name]
    before_both = config.peft_type == PeftType.MULTITASK_PROMPT_TUNING and config.num_transformer_submodules != 1
    return config.peft_type in KEYED or before_both


def _without_gaps(model: Any, batch: Batch, apart: Apart, per_token: bool = False) -> dict[str, Tensor]:
    """What has a value for each token, with the padding at the right."""
    pad = _pad(model)
    tokens = "input_ids" if batch.embeds is None else "inputs_embeds"
    fills = {tokens: pad, "token_type_ids": 0, **({"labels": IGNORE} if per_token else {})}
    laid = {name: apart.spread(batch.given[name], fill) for name, fill in fills.items() if name in batch.given}
    return {**laid, "attention_mask": apart.spread(torch.ones_like(batch.real)).long()}


def _pad(model: Any) -> int:
    return getattr(model.base_model.config, "pad_token_id", None) or 0


def _encoder(model: Any, plain: Any, state: State, given: dict[str, Any]) -> Any:
    """The output of a model in which the prompt sees the input, or whose output is of rows; each row has its prompt for itself."""
    names, tasks = given.pop("adapter_names", None), given.get("task_ids")
    if given.get("encoder_outputs") is not None:
        if names is not None and {*names} != {model.active_adapter}:
            raise ValueError(
                f"adapter_names: got {sorted({*names})}, expected {model.active_adapter!r}, the active adapter, for each row where"
                " encoder_outputs is given: it was made behind one adapter's prompt"
            )
        state.last = APART, "PEFT's own forward: encoder_outputs was given"
        return plain.forward(model, **given)
    as_tuple = given.pop("return_dict", True) is False
    batch = Batch(model, given)
    names = _named(model, names, batch.shape[0])
    heads_apart = len({*names}) > 1 and not grouped.takes_names(model.base_model)
    if heads_apart or any(_stands_elsewhere(model, name) for name in names):
        out = _by_adapter(model, plain, state, batch, names)
    else:
        with grouped.wholes_of(model.base_model, names):
            out = _in_front(model, plain, state, batch, find_prompts(model, batch.shape[0], names, tasks))
    return out.to_tuple() if as_tuple else out


def _by_adapter(model: Any, plain: Any, state: State, batch: Batch, names: Sequence[str]) -> Any:
    """Each adapter's rows for themselves, without gaps; logits of the batch's own tokens."""
    base, per_token = model.base_model, plain is PeftModelForTokenClassification
    if sharing.checkpoints(base) and any(name != BASE and model.peft_config[name].peft_type in KEYED for name in names):
        raise ValueError(
            "gradient_checkpointing: a prefix needs a cache in a model whose prompt sees the input, and checkpointing drops it; turn it off"
        )
    apart = Apart(batch, trees.find_rows(batch.real, None))

    def run(name: str, own: dict[str, Any]) -> Any:
        with grouped.wholes_of(base, [name]):
            if name == BASE:
                return base(**_of_the_base(own))
            if _stands_elsewhere(model, name):
                alone = _as_if_active(model, name)
                return _own_logits(alone, plain.forward(alone, **own))
            rows = Batch(model, own)
            found = find_prompts(model, rows.shape[0], [name] * rows.shape[0], own.get("task_ids"))
            return _in_front(model, plain, state, rows, found)

    laid = [name for name in LAID_OUT if name != "labels" or per_token]
    rest = {name: value for name, value in batch.given.items() if name not in laid}
    given = {**rest, **_without_gaps(model, batch, apart, per_token)}
    if len({*names}) == 1:
        out = run(names[0], given)
        told = "PEFT's own forward, without gaps: the prompt does not stand before the encoder's input alone"
    else:
        out = grouped.forward(run, given, names)
        told = "an adapter's rows at a time: its prompt does not stand before the encoder's input alone, or its head is more than a layer"
    state.last = APART, told
    if per_token:
        unmoved = torch.zeros(apart.count, dtype=torch.long, device=batch.device)
        out = type(out)(**{**out, "logits": apart.gather(out.logits, unmoved)})
    return out


def _own_logits(model: Any, out: Any) -> Any:
    """An encoder-decoder's output without the logits of a prompt before the decoder's input."""
    config = model.active_peft_config
    if config.peft_type != PeftType.MULTITASK_PROMPT_TUNING:
        return out
    return type(out)(**{**out, "logits": out.logits[:, config.num_virtual_tokens :]})


def _in_front(model: Any, plain: Any, state: State, batch: Batch, found: Prompts) -> Any:
    """The rows with their prompts in front of the encoder's input."""
    base, given, per_token = model.base_model, batch.given, plain is PeftModelForTokenClassification
    causal = not base.config.is_encoder_decoder and any(getattr(one, "is_causal", False) for one in base.modules())
    left = causal and plain is PeftModelForSequenceClassification  # such a model looks at the last column
    apart = Apart(batch, trees.find_rows(batch.real, None), left=left)
    state.last = APART, "each row has its prompt for itself, which sees the input"
    rows = _concatenate(model, batch, apart, found, apart.spread(torch.ones_like(batch.real)))
    row: dict[str, Any] = {"inputs_embeds": rows.embeds, "attention_mask": rows.attention_mask}
    before = _before(found, batch.device)
    shift = torch.full_like(before.lengths, before.mask.shape[1]) if left else before.lengths
    if causal and "position_ids" in _parameters(base):
        row["position_ids"] = rows.position_ids
    fills = {"token_type_ids": 0, **({"labels": IGNORE} if per_token else {})}
    if plain is PeftModelForFeatureExtraction:
        del fills["token_type_ids"]  # as PEFT has it
    for name, fill in fills.items():
        if name in given:
            row[name] = given[name].new_full(rows.position_ids.shape, fill)
            row[name][apart.row, apart.column + shift[apart.row]] = given[name].flatten()[apart.tokens]
    if "labels" in given and not per_token:
        row["labels"] = given["labels"]
    out = base(**batch.rest("task_ids"), **row)
    if per_token:
        out = type(out)(**{**out, "logits": apart.gather(out.logits, shift)})
    return out


FORWARDS = {
    PeftModelForCausalLM: _causal,
    PeftModelForSeq2SeqLM: _encoder,
    PeftModelForSequenceClassification: _encoder,
    PeftModelForTokenClassification: _encoder,
    PeftModelForFeatureExtraction: _encoder,
}
"""Of PEFT's classes of models."""
