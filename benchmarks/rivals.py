"""Who is timed: every rival of an operator as a plain function of the same tensors.

A contest is one case in memory. Where a few rows meet a large weight, it holds several copies of the weights that
take turns, as the layers of a model do: a weight that is still in the cache from the last call would flatter
everyone.
"""

import collections
import copy
import functools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlora
from fastlora import functional, ops
from fastlora.choice.clock import Run
from fastlora.choice.problems import ROWS_FROM_MEMORY
from fastlora.limits import packed_product, packs
from fastlora.operators import lora_linear, prefix_concat

from .cases import OPERATORS, BlockCase, Case, LoRACase, LoRALinearCase, MultiLoRACase, PrefixConcatCase
from .machine import last_level_cache

FASTLORA = "fastlora"
MEANINGS = {
    "packed": "packed: the frozen products alone, on copies of the weight that oneDNN has laid out",
    "merged": "merged: the adapter added into the weight beforehand",
    "addmm": "addmm: torch's products, the adapter's added in place, dropout beside them: the design of Unsloth and Axolotl",
    "peft": "peft: PEFT's own code, eager",
    "compiled": "compiled: the same under torch.compile",
    FASTLORA: "fastlora: this library (a row an implementation; * is the one that runs by default)",
}
SCALE = 2
MOST_COPIES = 32
FROM_MEMORY = 200e6  # bytes of weights that no card's L2 cache holds
FLOAT32 = "32"  # added to a rival's name: the same with float32 adapters under autocast, PEFT's default

Outputs = Tensor | Sequence[Tensor]
Leaves = Mapping[str, Sequence[Tensor]]  # what training differentiates, by the names of the gradients
Result = TypeVar("Result")
WithLoRA = LoRALinearCase | MultiLoRACase | BlockCase
Makers = Mapping[str, Callable[[nn.Module], Callable[..., Outputs]]]  # of PEFT's layer, or the block of them


class Rival(NamedTuple):
    call: Callable[[int], Outputs]  # the number of a copy -> y
    leaves: Sequence[Leaves]  # for each copy; none: it has no backward
    every: Callable[[], Mapping[str, Tensor]] | None = None  # all results by name, where `call` gives one of several


def forced(function: Callable[..., Result], implementation: str | None) -> Callable[..., Result]:
    """`function` with fastlora's operators forced to use that implementation; None: as it is."""
    if implementation is None:
        return function

    def run(*arguments: Any) -> Result:
        before, ops.forced = ops.forced, implementation
        try:
            return function(*arguments)
        finally:
            ops.forced = before

    return run


class Contest(NamedTuple):
    copies: int
    rivals: dict[str, Rival]  # the first one is the baseline
    dy: Outputs

    def run(self, name: str, training: bool, implementation: str | None = None) -> Run:
        """The rival as a function of the turn: its forward without a graph, or its forward and backward.

        implementation: what fastlora's operators are forced to use; None: what `choose` says.
        """
        rival = self.rivals[name]
        leaves = [[leaf for some in one.values() for leaf in some] for one in rival.leaves]

        def forward(turn: int) -> object:
            with torch.no_grad():
                return rival.call(turn % self.copies)

        def forward_and_backward(turn: int) -> object:
            copy = turn % self.copies
            return torch.autograd.grad(rival.call(copy), leaves[copy], self.dy)

        return forced(forward_and_backward if training and leaves else forward, implementation)

    def runs(self, training: bool, implementations: Sequence[str] = ()) -> dict[str, Run]:
        """Every rival, and fastlora once more for each implementation forced."""
        runs = {name: self.run(name, training) for name in self.rivals}
        return runs | {name: self.run(FASTLORA, training, name) for name in implementations}


def like(case: Case, device: torch.device, rows: int, columns: int) -> Tensor:
    """A tensor of that shape, without memory."""
    return torch.empty(1, 1, dtype=case.dtype, device=device).expand(rows, columns)


def choice(case: Case, training: bool, device: torch.device) -> str:
    """The implementation that `choose` takes for the case's forward; of a block's layers, for the first."""
    _, choose = CONTESTS[case.operator]
    return choose(case, training, device).implementation


def implementations(case: Case, training: bool, device: torch.device) -> list[str]:
    """The implementations worth timing here: first the one that `choose` takes, then every kernel of this device."""
    chosen = choice(case, training, device)
    if ops.forced is not None:
        return [chosen]
    return [chosen, *(name for name in ops.candidates(case.operator, device, case.dtype) if name != chosen)]


def random_tensor(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype)


class Siblings(nn.Module):
    """Linear layers (in-features, out-features) by name that read one x, but the last of them, which reads another."""

    def __init__(self, sizes: Iterable[tuple[str, tuple[int, int]]]) -> None:
        super().__init__()
        for name, (K, N) in sizes:
            self.add_module(name, nn.Linear(K, N, bias=False))

    def forward(self, x: Tensor, of_last: Tensor) -> list[Tensor]:
        *shared, last = self.children()
        return [*(layer(x) for layer in shared), last(of_last)]


class Block(nn.Module):
    """The seven linear layers of a Llama block, without attention and activation: each x is given from outside."""

    def __init__(self, case: BlockCase) -> None:
        super().__init__()
        sizes = list(case.linears.items())
        self.self_attn, self.mlp = Siblings(sizes[:4]), Siblings(sizes[4:])

    def forward(self, x: Tensor, attended: Tensor, normed: Tensor, activated: Tensor) -> list[Tensor]:
        return [*self.self_attn(x, attended), *self.mlp(normed, activated)]


def make_layer(case: WithLoRA, training: bool, device: torch.device) -> Any:
    """PEFT's own lora.Linear, or the Block of them, with adapters named "0", "1", ..., in the case's dtypes, every weight random."""
    with torch.device("meta"):
        if isinstance(case, BlockCase):
            base: nn.Module = Block(case)
        else:
            base = nn.Sequential(collections.OrderedDict(layer=nn.Linear(case.K, case.N, getattr(case, "bias", False))))
    names = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    p, model = case.dropout_p if training else 0.0, None
    for i, R in enumerate(case.ranks if isinstance(case, MultiLoRACase) else [case.R]):
        config = peft.LoraConfig(r=R, lora_alpha=SCALE * R, lora_dropout=p, target_modules=names)
        if model is None:
            model = peft.get_peft_model(base, config, adapter_name="0", autocast_adapter_dtype=False)
        else:
            model.add_adapter(str(i), config, autocast_adapter_dtype=False)
    for name, parameter in list(base.named_parameters()):
        owner, _, kind = name.rpartition(".")
        trained, scale = "lora_" in owner, parameter.shape[-1] ** -0.5 if kind == "weight" else 1.0
        dtype = case.adapter_dtype if trained else case.dtype
        drawn = random_tensor(*parameter.shape, dtype=dtype, device=device, scale=scale)
        setattr(base.get_submodule(owner), kind, nn.Parameter(drawn, requires_grad=trained))
    return (base if isinstance(case, BlockCase) else base.get_submodule("layer")).train(training)


def twin(module: nn.Module) -> nn.Module:
    """The module again, over the same parameters."""
    return copy.deepcopy(module, {id(one): one for one in module.parameters()})


def in_place_of_lora(module: nn.Module, make: Callable[[Any], nn.Module]) -> Callable[..., Outputs]:
    """A twin with what is made of each of PEFT's layers in its place; a plain layer that stands alone is its function, which costs less to call."""
    if isinstance(module, peft.tuners.lora.Linear):
        made = make(module)
        return functools.partial(F.linear, weight=made.weight, bias=made.bias) if type(made) is nn.Linear else made
    module = twin(module)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, peft.tuners.lora.Linear):
            module.set_submodule(name, make(layer))
    return module


def merged(layer: Any) -> nn.Module:
    """The frozen layer with the adapter added into its weight."""
    base, a, b = layer.get_base_layer(), layer.lora_A["0"].weight.detach(), layer.lora_B["0"].weight.detach()
    linear = twin(base)
    weight = torch.addmm(base.weight.float(), b.float(), a.float(), alpha=SCALE).to(base.weight.dtype)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _packed(layer: Any, x: Tensor, dy: Tensor | None) -> Callable[..., Any]:
    """The frozen products alone, y and (with a dy) dx, on copies of the weight in oneDNN's own layout."""
    weight: Tensor = layer.get_base_layer().weight
    products = [packed_product(x.detach(), weight)]
    if dy is not None:
        products.append(packed_product(dy, weight.t().contiguous()))
    return lambda _: [product(0) for product in products]


class AddmmFunction(torch.autograd.Function):
    """The adapter beside the frozen product by torch's own products, added in place: what Unsloth and Axolotl made of LoRA's layers."""

    @staticmethod
    def forward(ctx, x, dropped, weight, bias, lora_a, lora_b):
        """x [M, K]; dropped: d(x), None where nothing is dropped."""
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        xa = (x if dropped is None else dropped) @ a.T  # [M, R]
        ctx.save_for_backward(x if dropped is None else dropped, weight, lora_a, lora_b, xa)
        ctx.drops = dropped is not None
        return F.linear(x, weight, bias).addmm_(xa, b.T, alpha=SCALE)

    @staticmethod
    def backward(ctx, dy):
        dropped, weight, lora_a, lora_b, xa = ctx.saved_tensors
        a, b = lora_a.to(dy.dtype), lora_b.to(dy.dtype)
        dxa = dy @ b * SCALE  # [M, R]
        da, db = dxa.T @ dropped, SCALE * dy.T @ xa
        dx = dy @ weight
        ddropped = dxa @ a if ctx.drops else None
        if ddropped is None:
            dx.addmm_(dxa, a)
        return dx, ddropped, None, None, da.to(lora_a.dtype), db.to(lora_b.dtype)


class AddmmLinear(nn.Module):
    """AddmmFunction in the place of one of PEFT's layers, over its tensors."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        (name,) = layer.active_adapters
        base = layer.get_base_layer()
        self.weight, self.bias = base.weight, base.bias
        self.lora_a, self.lora_b = layer.lora_A[name].weight, layer.lora_B[name].weight
        self.dropout = layer.lora_dropout[name]

    def forward(self, x: Tensor) -> Tensor:
        dropped = self.dropout(x) if self.training and isinstance(self.dropout, nn.Dropout) else None
        y: Tensor = AddmmFunction.apply(x, dropped, self.weight, self.bias, self.lora_a, self.lora_b)
        return y


MADE_OF_LORA: Makers = {
    "frozen": lambda module: in_place_of_lora(module, lambda layer: layer.get_base_layer()),
    "merged": lambda module: in_place_of_lora(module, merged),
    "addmm": lambda module: in_place_of_lora(module, AddmmLinear),
    "peft": lambda module: module,
    "compiled": lambda module: torch.compile(module, dynamic=False),
    FASTLORA: lambda module: fastlora.accelerate(twin(module)),
}


def _mixed(case: MultiLoRACase, training: bool, device: torch.device) -> Makers:
    """What a batch with several adapters needs to know which row has which."""
    examples, adapters = case.adapters_of_examples(), [str(i) for i in range(len(case.ranks))]
    names = ["__base__" if i < 0 else str(i) for i in examples]
    # A model groups the rows once per forward, for all its layers.
    groups = functional.group_rows(torch.tensor(examples, device=device), len(adapters))
    scales, p = [SCALE] * len(adapters), case.dropout_p

    def fused(module: Any) -> Callable[..., Outputs]:
        weight = module.get_base_layer().weight
        lora_a, lora_b = ([part[i].weight for i in adapters] for part in (module.lora_A, module.lora_B))
        return lambda x: functional.multi_lora(
            x, weight, None, lora_a, lora_b, scales, groups, dropout_p=p, training=training
        )

    return {"peft": lambda module: functools.partial(module, adapter_names=names), FASTLORA: fused}


def _with_lora(
    case: WithLoRA, training: bool, device: torch.device, names: Collection[str], to_check: bool, exactly: bool
) -> Contest:
    make, used, copies, sizes = dict(MADE_OF_LORA), [0], 1, case.linears
    # Siblings read the same x.
    in_widths = [K for name, (K, _) in sizes.items() if name not in ("k_proj", "v_proj", "up_proj")]
    out_widths = [N for _, N in sizes.values()]
    if math.prod(case.rows) <= ROWS_FROM_MEMORY and not to_check:
        cache = FROM_MEMORY if device.type == "cuda" else 2 * last_level_cache()
        weights = sum(K * N for K, N in sizes.values()) * case.dtype.itemsize
        copies = min(MOST_COPIES, 1 + int(cache // weights))
    if isinstance(case, MultiLoRACase):
        make |= _mixed(case, training, device)
        # Autograd refuses PEFT's adapters without rows.
        used = sorted({i for i in case.adapters_of_examples() if i >= 0})
    inputs, dy = (
        [random_tensor(*case.rows, width, dtype=case.dtype, device=device) for width in widths]
        for widths in (in_widths, out_widths)
    )
    layers = [make_layer(case, training, device) for _ in range(copies)]
    if exactly:
        inputs, dy, layers = ([one.double() for one in some] for some in (inputs, dy, layers))
    inputs = [x.requires_grad_(training) for x in inputs]
    make["packed"] = lambda layer: _packed(layer, inputs[0], dy[0] if training else None)
    of_inputs: Leaves = {f"dx{i}" if len(inputs) > 1 else "dx": [x] for i, x in enumerate(inputs)}

    def leaves_of(layer: Any) -> Leaves:
        if isinstance(case, BlockCase):
            return {**of_inputs, **{name: [one] for name, one in layer.named_parameters() if one.requires_grad}}
        parts = {"da": layer.lora_A, "db": layer.lora_B}
        return {**of_inputs, **{name: [part[str(i)].weight for i in used] for name, part in parts.items()}}

    leaves = [leaves_of(layer) for layer in layers]
    fewer = {"frozen": [of_inputs] * copies, "merged": [of_inputs] * copies, "packed": []}

    def rival(name: str) -> Rival:
        made = [make[name](layer) for layer in layers]
        return Rival(lambda copy: made[copy](*inputs), fewer.get(name, leaves))

    return Contest(copies, {name: rival(name) for name in names}, dy)


def _choose_lora(case: LoRACase, training: bool, device: torch.device) -> ops.Choice:
    K, N = next(iter(case.linears.values()))
    x, weight = like(case, device, math.prod(case.rows), K), like(case, device, N, K)
    return lora_linear.choose(x, weight, training and case.dropout_p > 0, mixed=isinstance(case, MultiLoRACase))


def _concat_as_peft(
    prompts: Tensor, index: Tensor, ids: Tensor, embedding: Tensor, mask: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As PEFT's PeftModelForCausalLM does prompt tuning, and with a prompt of its own for each row where S > 1."""
    (S, P, _), B = prompts.shape, len(ids)
    embeds = F.embedding(ids, embedding)
    prompts = prompts.expand(B, -1, -1) if S == 1 else prompts[index]
    mask = torch.cat((mask.new_ones(B, P), mask), 1)
    labels = torch.cat((labels.new_full((B, P), -100), labels), 1)
    return torch.cat((prompts.to(embeds.dtype), embeds), 1), mask, labels


def _prefix_concat(
    case: PrefixConcatCase, _: bool, device: torch.device, names: Collection[str], to_check: bool, exactly: bool
) -> Contest:
    """A full batch, where PEFT's way and fastlora's give the same."""
    ids = torch.randint(case.V, (case.B, case.T), device=device)  # the labels, too
    mask, index = torch.ones_like(ids), torch.arange(case.B, device=device) % case.S
    prompts = random_tensor(case.S, case.P, case.D, dtype=case.adapter_dtype, device=device)
    embedding = random_tensor(case.V, case.D, dtype=case.dtype, device=device)
    dy = random_tensor(case.B, case.T + case.P, case.D, dtype=case.dtype, device=device)
    if exactly:
        prompts, embedding, dy = prompts.double(), embedding.double(), dy.double()
    prompts.requires_grad_()
    given = prompts, index, ids, embedding, mask, ids.clone()
    compiled = torch.compile(_concat_as_peft, dynamic=False)

    def fused() -> functional.Prefixed:
        own = {"prompt_index": index, "input_ids": ids, "embedding": embedding, "labels": ids}
        return functional.prefix_concat(prompts, None, mask, **own)

    leaves = [{"dprompts": [prompts]}]
    rivals = {
        "frozen": Rival(lambda _: F.embedding(ids, embedding), []),
        "peft": Rival(lambda _: _concat_as_peft(*given)[0], leaves),
        "compiled": Rival(lambda _: compiled(*given)[0], leaves),
        FASTLORA: Rival(lambda _: fused().embeds, leaves, lambda: fused()._asdict()),
    }
    return Contest(1, {name: rivals[name] for name in names}, [dy])


def _choose_prefix(case: PrefixConcatCase, _: bool, device: torch.device) -> ops.Choice:
    return prefix_concat.choose(like(case, device, 1, case.D), case.B * case.T)


CONTESTS: dict[str, tuple[Callable[..., Contest], Callable[..., ops.Choice]]] = {
    # What builds a case, called as `build` is, and what chooses the implementation of its forward, called as `choice` is.
    "lora_linear": (_with_lora, _choose_lora),
    "multi_lora": (_with_lora, _choose_lora),
    "prefix_concat": (_prefix_concat, _choose_prefix),
}


def rivals_of(case: Case, device: torch.device, without: Collection[str] = ()) -> list[str]:
    """The rivals that a case has on this device, but those left out."""
    left_out = {*without, *(("merged", "packed") if isinstance(case, BlockCase) else ())}
    left_out |= set() if packs(case.dtype, device) else {"packed"}
    return [name for name in OPERATORS[case.operator].rivals if name not in left_out]


def build(
    case: Case,
    training: bool,
    device: torch.device,
    names: Collection[str] | None = None,
    to_check: bool = False,
    exactly: bool = False,
) -> Contest:
    """The case in memory, seeded, with the rivals named, or all that it has; a block is trained.

    to_check: no copies of the weights take turns. exactly: the same numbers in float64.
    """
    torch.manual_seed(0)
    names = rivals_of(case, device) if names is None else names
    if "compiled" in names:
        torch.compiler.reset()  # a case must not be slowed by the graphs compiled for the cases before it
    make, _ = CONTESTS[case.operator]
    return make(case, training, device, names, to_check, exactly)


def under_autocast(contest: Contest, dtype: torch.dtype, device: torch.device) -> Contest:
    """As PEFT trains float32 adapters on a 16-bit base."""

    def wrapped(rival: Rival) -> Rival:
        def call(copy: int) -> Outputs:
            with torch.autocast(device.type, dtype):
                return rival.call(copy)

        return rival._replace(call=call)

    return contest._replace(rivals={name: wrapped(rival) for name, rival in contest.rivals.items()})


def build_for_card(case: Any, device: torch.device) -> Contest:
    """A training contest with 16-bit adapters, and PEFT and fastlora also with float32 adapters under autocast, as PEFT trains by default."""
    own = build(replace(case, adapter_dtype=case.dtype), True, device, rivals_of(case, device, without=("packed",)))
    wide = build(replace(case, adapter_dtype=torch.float32), True, device, ["peft", FASTLORA])
    autocast = under_autocast(wide, case.dtype, device).rivals
    return own._replace(rivals=own.rivals | {name + FLOAT32: rival for name, rival in autocast.items()})
