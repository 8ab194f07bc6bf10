"""What rows have in common, run once through a causal model: a soft prompt, or the tokens that they begin with (trees.py).

    tree    the model's attention is fusion.py's, and is told the segments (operators/attention.py)
    mask    the model's own attention is given a mask [1, 1, n, keys] that says the same
    apart   every row has its prompt for itself: where a model takes neither, or more is asked of it than its logits

A model's way is the first of these whose logits, for a small batch, are those of the rows alone. Nothing is a cache: gradient checkpointing runs the
rows as anything else. What rows begin with is shared below the head as well: TRL's trainers ask the model below for hidden states, past the forward
of the model that has the head, and compute log-probabilities themselves. Each row gets all of its hidden states then, copies where they were shared.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from fastlora import trees
from fastlora.bounds import nearly_equal
from fastlora.checks import transform_obstacle
from fastlora.language_model_loss import output_embedding, undisturbed
from fastlora.packing import MAY_BE_GIVEN, PROBE_TOKENS, UNFIT, attention_drops, is_compiled
from fastlora.swap import become, derive, undo
from fastlora.trees import IGNORE, KEY, Root, Tree

TREE, MASK, APART = "tree", "mask", "apart"
BELOW = f"{KEY}_below"
"""Under which the `__dict__` of the model below the head has what is known of it."""
_decided: ContextVar[bool] = ContextVar("fastlora_sharing_decided", default=False)
"""Whether the model with the head is under way: what its rows share, if anything, was its to say, who knows the labels."""
PROBE_PROMPT = 10  # more than trees.LEAST_SHARED

Keys = Sequence[tuple[Tensor, Tensor]]
"""Of each layer the keys and the values of all prompts, one after the other: [1, heads, their rows, D]."""


@dataclass
class State:
    """What a model is known to allow, and what its last call did."""

    ways: dict[bool, list[str]] = field(default_factory=dict)  # keys_only: what is exact
    last: tuple[str, str] | None = None  # (way, reason) of the last call

    def describe(self, replaced: bool = False) -> tuple[str, str]:
        """(way, reason), for people. replaced: somebody has put another forward before the model's, as TRL and Liger do."""
        never = f"not called yet, unless compiled{', or by the forward that was put before it' * replaced}"
        return self.last or (APART, never)


def arguments(tree: Tree, way: str, dtype: torch.dtype, keys: Keys | None = None) -> dict[str, Any]:
    """What tells a model's forward of the tree, beside its tokens [1, n] or their embeddings.

    keys: of the prompts, where they are given as keys and values.
    """
    given: dict[str, Any] = {"position_ids": tree.position_ids[None], "use_cache": False}
    if way == MASK:
        given["attention_mask"] = tree.mask(dtype)
        if keys is not None:
            given["past_key_values"] = cache_of(keys)
        return given
    return {
        **given,
        # Of four dimensions transformers hands a mask on as it is. Whoever looks at this one computes NaN: our attention does not.
        "attention_mask": torch.full((1, 1, 1, 1), torch.nan),
        "cu_seq_lens_q": tree.starts.int(),
        "cu_seq_lens_k": tree.key_starts.int(),
        "max_length_q": int(tree.starts.diff().max()),
        "max_length_k": int(tree.key_starts.diff().max()),
        "segment_parents": tree.parents,
        **({} if keys is None else {"key_roots": keys}),
    }


def cache_of(keys: Keys, rows: int = 1) -> DynamicCache:
    """A cache that begins with them, the same for so many rows."""
    cache = DynamicCache()
    for layer, (key, value) in enumerate(keys):
        cache.update(key.expand(rows, -1, -1, -1), value.expand(rows, -1, -1, -1), layer)
    return cache


def keys_of(cache: Any) -> Keys:
    """What a model's layers have left in a cache."""
    return [(layer.keys, layer.values) for layer in cache.layers]


def with_prompts(tree: Tree, embedded: Tensor, prompts: Tensor) -> Tensor:
    """The embeddings [1, n, D] of a tree's row: of its tokens, but for the prompts' rows, [all prompts' rows, D]."""
    virtual = (tree.source < 0).nonzero().flatten()
    rows = prompts.to(embedded.dtype)[-1 - tree.source[virtual]]
    return embedded[0].index_copy(0, virtual, rows)[None]


def columns(kept: int | Tensor) -> slice | Tensor:
    """The columns of a batch that a model's `logits_to_keep` names: 0 for all."""
    return kept if isinstance(kept, Tensor) else slice(-kept, None)


def run(call: Callable[..., Any], given: Mapping[str, Any], tree: Tree, kept: int | Tensor, takes_kept: bool) -> Any:
    """The model's output for the tree's row, with the logits [B, columns, V] of the batch's own places.

    kept: as a model's `logits_to_keep`. takes_kept: whether the model has that.
    """
    every = isinstance(kept, int) and kept == 0
    places = tree.places[:, columns(kept)]
    few = takes_kept and not every and given.get("labels") is None and places.numel() < len(tree.source)
    with trees.laying_out(tree.places) as laid:
        out = call(**given, **({"logits_to_keep": places.flatten()} if few else {}))
    if laid.taken or out.get("logits") is None:
        return out
    logits = out.logits[0] if few else out.logits[0][places.flatten()]
    return type(out)(**{**out, "logits": logits.view(*places.shape, -1)})


def labelled(given: Mapping[str, Any], tree: Tree) -> dict[str, Any]:
    """The labels of a batch as the tree's row has them."""
    found = {}
    if given.get("labels") is not None:
        found["labels"] = tree.labels(given["labels"])
    if given.get("shift_labels") is not None:
        found["shift_labels"] = tree.gather(given["shift_labels"], IGNORE)
    return found


def targets_of(given: Mapping[str, Any]) -> Tensor | None:
    """The token that each position of a batch is to predict, or -100: [B, T]."""
    labels, shifted = given.get("labels"), given.get("shift_labels")
    if shifted is not None or labels is None:
        return shifted
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE)


def checkpoints(model: nn.Module) -> bool:
    return model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def window_of(model: Any) -> int | None:
    """How far back some of the model's layers see, or None: all of them see all."""
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    return window if window and getattr(config, "use_sliding_window", True) else None


class Probe:
    """A small batch whose rows begin alike, and a model's logits of its rows alone."""

    def __init__(self, call: Callable[..., Any], embed: Callable[[Tensor], Tensor], words: int, device: Any) -> None:
        drawn = torch.Generator().manual_seed(1)
        longest, count = max(PROBE_TOKENS), len(PROBE_TOKENS)
        self.call, self.embed = call, embed
        self.prompt = torch.randint(words, (PROBE_PROMPT,), generator=drawn).to(device)
        self.ids, self.other = torch.randint(words, (2, count, longest), generator=drawn).to(device)
        self.other[1] = self.ids[1]
        self.real = torch.arange(longest) < torch.tensor(PROBE_TOKENS)[:, None]
        rows = [torch.cat((self.prompt, row[:tokens])) for row, tokens in zip(self.ids, PROBE_TOKENS, strict=True)]
        self.alone = torch.cat([self._logits(row[None])[0, PROBE_PROMPT:] for row in rows])
        whole = torch.cat((self.prompt.expand(count, -1), self.ids), 1)
        mask = F.pad(self.real.long(), (PROBE_PROMPT, 0), value=1).to(device)
        padded = self._logits(whole, attention_mask=mask)[:, PROBE_PROMPT:][self.real.to(device)]
        self.noise = (padded - self.alone).abs().max()  # what the model itself makes of padding

    def _logits(self, ids: Tensor, **given: Any) -> Tensor:
        logits: Tensor = self.call(inputs_embeds=self.embed(ids), use_cache=False, **given).logits
        return logits

    def prompt_keys(self) -> Keys:
        """What the model's layers make of the prompt."""
        embedded = self.embed(self.prompt[None])
        return keys_of(
            self.call(inputs_embeds=embedded, past_key_values=DynamicCache(), use_cache=True).past_key_values
        )

    def allows(self, way: str, keys: Keys | None) -> bool:
        """Whether the model gives the same logits that way, to the last bit whatever the first row is.

        keys: the prompt's, where it is to be given as keys and values.
        """
        try:
            found, found_by_other = (self._by_tree(way, ids, keys) for ids in (self.ids, self.other))
        except UNFIT:
            return False
        second = slice(PROBE_TOKENS[0], None)
        if found.shape != self.alone.shape or not torch.equal(found[second], found_by_other[second]):
            return False
        return nearly_equal(found, self.alone) or bool((found - self.alone).abs().max() <= 4 * self.noise)

    def _by_tree(self, way: str, ids: Tensor, keys: Keys | None) -> Tensor:
        rows = trees.find_rows(self.real, None)
        roots, root_of = [Root(PROBE_PROMPT, 0)], [0] * rows.texts
        tree = trees.grow(rows, ids.shape, roots, root_of, keys_only=keys is not None, device=ids.device)
        embedded = self.embed(tree.gather(ids, 0))
        if keys is None:
            embedded = with_prompts(tree, embedded, self.embed(self.prompt))
        logits: Tensor = self.call(inputs_embeds=embedded, **arguments(tree, way, embedded.dtype, keys)).logits
        return logits[0][tree.places[self.real.to(ids.device)]]


def find_way(
    state: State, model: Any, call: Callable[..., Any], embed: Callable[[Tensor], Tensor], *, keys_only: bool = False
) -> str:
    """The first way that is exact for the model, found out at its first call.

    call: the model's forward; embed: of tokens.
    """
    if not state.ways:  # both at once: in a later call somebody may have hooked the head
        state.ways = {kind: _probe(model, call, embed, kind) for kind in (False, True)}
    drops = attention_drops(model)
    return next((way for way in state.ways[keys_only] if way != TREE or not drops), APART)


@torch.no_grad()
def _probe(model: Any, call: Callable[..., Any], embed: Callable[[Tensor], Tensor], keys_only: bool) -> list[str]:
    """The ways that are exact."""
    words = model.config.get_text_config(decoder=True).vocab_size
    with undisturbed(model):
        try:
            probe = Probe(call, embed, words, model.device)
            keys = probe.prompt_keys() if keys_only else None
        except UNFIT:
            return []
        return [way for way in (TREE, MASK) if probe.allows(way, keys)]


def call_obstacle(model: Any, given: Mapping[str, Any]) -> str | None:
    """Why rows may have nothing in common in this call, or None."""
    more = [name for name, value in given.items() if value is not None and name not in (*MAY_BE_GIVEN, *TAKEN)]
    if more:
        return f"{', '.join(more)} was given"
    if given.get("use_cache"):
        return "use_cache was given"
    if getattr(model.config, "output_router_logits", False):
        return "the loss is also of the experts' balance, which counts tokens"
    if torch.compiler.is_compiling() or any(map(is_compiled, model.modules())):
        return "torch.compile has a part of the model"
    return transform_obstacle()


BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Of texts that are packed in a row; position_ids say the same."""
TAKEN = ("inputs_embeds", "logits_to_keep", "ignore_index", "fused_lm_head", *BOUNDS)
"""What a call may be given beside packing.py's. TRL's fused head sums over the tokens with labels."""


def too_long(model: Any, tree: Tree) -> bool:
    """Whether some layer would not see all that a row has."""
    window = window_of(model)
    return window is not None and int(tree.position_ids.max()) >= window


def attach(model: nn.Module) -> None:
    """Let the outermost transformers model with a language model's head share what rows begin with.

    Raises:
        ValueError: there is none, or it is no causal model.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and output_embedding(module) is not None:
            if module.config.is_encoder_decoder:
                break
            if KEY not in module.__dict__:
                kind: Any = type(module)
                become(module, with_shared_prefix(kind))
            module.__dict__[KEY] = State()
            _attach_below(module)
            return
    raise ValueError(f"share_prefix=True: {type(model).__name__} has no causal transformers model in it")


def _attach_below(model: PreTrainedModel) -> None:
    """The same for whoever calls the model below the head by itself."""
    below = model.base_model
    if below is model or not isinstance(below, PreTrainedModel):
        return
    if BELOW not in below.__dict__:
        kind: Any = type(below)
        become(below, with_shared_prefix_below(kind))
    below.__dict__[BELOW] = State()


def last_call(model: nn.Module) -> tuple[str, str]:
    """(way, reason) of the last call of what `attach` has changed: of the model with the head, or of the one below where only that one shared."""
    calls = [
        module.__dict__[key].describe() for module in model.modules() for key in (KEY, BELOW) if key in module.__dict__
    ]
    return next((call for call in calls if call[0] != APART), calls[0])


def detach(module: nn.Module) -> None:
    """Give a module its class back, if it was swapped."""
    for key in (KEY, BELOW):
        if module.__dict__.pop(key, None) is not None:
            undo(module)


@functools.cache
def with_shared_prefix(plain: Any) -> type:
    """The class derived from a transformers model's."""
    parameters = list(inspect.signature(plain.forward).parameters.values())[1:]
    names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__.get(KEY)
        if state is None or torch.compiler.is_compiling() or len(args) > len(names):
            return plain.forward(self, *args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        token = _decided.set(True)
        try:
            out = _shared(self, functools.partial(plain.forward, self), state, given, "logits_to_keep" in names)
            return plain.forward(self, **given) if isinstance(out, str) else out
        finally:
            _decided.reset(token)

    return derive(plain, with_shared_prefix, forward=forward)


def _shared(model: Any, call: Callable[..., Any], state: State, given: dict[str, Any], takes_kept: bool) -> Any:
    """The model's output, what rows begin with run once; or why not."""
    found = _find(model, call, state, given)
    if isinstance(found, str):
        return found
    tree, row = found
    kept = ("num_items_in_batch", "ignore_index", "return_dict", "fused_lm_head")
    rest = {name: given[name] for name in kept if given.get(name) is not None}
    return run(call, {**rest, **row, **labelled(given, tree)}, tree, given.get("logits_to_keep") or 0, takes_kept)


def _find(
    model: Any, call: Callable[..., Any], state: State, given: Mapping[str, Any]
) -> tuple[Tree, dict[str, Any]] | str:
    """What a batch's rows begin with, and what the model is given in their place; or why they have no use of it.

    call: gives logits, or in their place what the model gives for each token.
    """
    found: Tree | str | None = call_obstacle(model, given) or _row_obstacle(model)
    if found is None:
        way = find_way(state, model, call, model.get_input_embeddings())  # at the first call, whatever rows that has
        found = _tree_of(model, given)
        if not isinstance(found, str) and way == APART:
            found = "the model's logits are others where rows have tokens in common"
    state.last = (APART, found) if isinstance(found, str) else (way, _told(found, given))
    if isinstance(found, str):
        return found
    dtype = model.get_input_embeddings().weight.dtype
    return found, {"input_ids": found.gather(given["input_ids"], 0), **arguments(found, way, dtype)}


@functools.cache
def with_shared_prefix_below(plain: Any) -> type:
    """The class derived from that of the model below the head."""
    parameters = list(inspect.signature(plain.forward).parameters.values())[1:]
    names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]

    @functools.wraps(plain.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        state = self.__dict__.get(BELOW)
        if state is None or torch.compiler.is_compiling() or len(args) > len(names) or _decided.get():
            return plain.forward(self, *args, **kwargs)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        out = _shared_below(self, functools.partial(plain.forward, self), state, given)
        return plain.forward(self, **given) if isinstance(out, str) else out

    return derive(plain, with_shared_prefix_below, forward=forward)


def _shared_below(model: Any, call: Callable[..., Any], state: State, given: dict[str, Any]) -> Any:
    """The model's output with the hidden states [B, T, D] of the batch's own places, what rows begin with run once; or why not. Those of padding
    are others than the model's own: of no use are both.
    """

    def with_hidden(**given: Any) -> Any:
        out = call(**given)
        return SimpleNamespace(logits=out.last_hidden_state, past_key_values=out.past_key_values)

    found = _find(model, with_hidden, state, given)
    if isinstance(found, str):
        return found
    tree, row = found
    out = call(**row, **({"return_dict": given["return_dict"]} if given.get("return_dict") is not None else {}))
    hidden = out.last_hidden_state[0][tree.places.flatten()].view(*tree.places.shape, -1)
    return type(out)(**{**out, "last_hidden_state": hidden})


TELLERS: list[Callable[[nn.Module], bool]] = []
"""What else may tell a model's layers of a batch's rows: each says whether it does so just now."""


def _row_obstacle(model: nn.Module) -> str | None:
    """Why a model's layers know of a batch's rows, or None."""
    if any(_is_told(hook) for module in model.modules() for hook in module._forward_pre_hooks.values()):
        return "a layer is told of the rows by a hook, as of their adapters"
    return "the rows have adapters of their own" if any(tells(model) for tells in TELLERS) else None


def _is_told(hook: Any) -> bool:
    """Whether a hook gives a layer something, as PEFT's do for a call."""
    return isinstance(hook, functools.partial) and bool(hook.keywords)


def _told(tree: Tree, given: Mapping[str, Any]) -> str:
    return f"{given['input_ids'].numel()} tokens of rows, {len(tree.source)} run"


def _tree_of(model: Any, given: Mapping[str, Any]) -> Tree | str:
    """What a batch's rows begin with, or why there is no use in it."""
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if ids is None or given.get("inputs_embeds") is not None:
        return "no input_ids were given"
    if given.get("return_dict") is False or (given.get("return_dict") is None and not model.config.return_dict):
        return "return_dict was False"
    if mask is not None and mask.shape != ids.shape:
        return f"the mask has {mask.dim()} dimensions"
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask != 0
    targets = targets_of(given)
    if targets is not None and bool((targets[~real] != IGNORE).any()):
        return "a label is predicted by padding"
    rows = trees.find_rows(real, given.get("position_ids"))
    if rows.texts > len(ids):
        return "a row has several texts"
    tree = trees.grow(rows, ids.shape, ids=ids, targets=targets, device=ids.device)
    if not trees.shares(tree, rows):
        return f"no rows begin with the same {trees.LEAST_SHARED} tokens before what they predict"
    return f"it sees {window_of(model)} tokens" if too_long(model, tree) else tree
