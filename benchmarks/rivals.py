"""Who is timed: every rival of an operator as a plain function of the same tensors.

A contest is one case in memory. Where a few rows meet a large weight, it holds several copies of the weights that
take turns, as the layers of a model do: a weight that is still in the cache from the last call would flatter
everyone.
"""

import collections
import functools
import math
from collections.abc import Callable, Collection, Sequence
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
from fastlora.operators import lora_linear, prefix_concat

from .cases import BlockCase, Case, LoRALinearCase, MultiLoRACase, PrefixConcatCase
from .machine import last_level_cache

FASTLORA = "fastlora"
RIVALS = {  # the first one is the baseline of every ratio
    "lora_linear": ("frozen", "packed", "merged", "addmm", "peft", "compiled", FASTLORA),
    "multi_lora": ("frozen", "peft", FASTLORA),
    "prefix_concat": ("frozen", "peft", "compiled", FASTLORA),
}
SCALE = 2
MOST_COPIES = 32
FROM_MEMORY = 200e6  # bytes of weights that no card's L2 cache holds
FLOAT32 = "32"  # added to a rival's name: the same with float32 adapters under autocast, PEFT's default

Outputs = Tensor | Sequence[Tensor]
Result = TypeVar("Result")


class Rival(NamedTuple):
    call: Callable[[int], Outputs]  # the number of a copy -> y
    leaves: Sequence[Sequence[Tensor]]  # what training differentiates, for each copy; none: it has no backward


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

        def forward(turn: int) -> object:
            with torch.no_grad():
                return rival.call(turn % self.copies)

        def forward_and_backward(turn: int) -> object:
            copy = turn % self.copies
            return torch.autograd.grad(rival.call(copy), rival.leaves[copy], self.dy)

        return forced(forward_and_backward if training and rival.leaves else forward, implementation)

    def runs(
        self, training: bool, implementations: Sequence[str] = (), without: Collection[str] = ()
    ) -> dict[str, Run]:
        """Every rival but those left out, and fastlora once more for each implementation forced."""
        runs = {name: self.run(name, training) for name in self.rivals if name not in without}
        return runs | {name: self.run(FASTLORA, training, name) for name in implementations}


def choice(case: Case | BlockCase, training: bool, device: torch.device) -> str:
    """The implementation that `choose` takes for the case's forward; of a block's layers, for the one that is hidden by hidden."""

    def like(rows: int, columns: int) -> Tensor:
        return torch.empty(1, 1, dtype=case.dtype, device=device).expand(rows, columns)

    if isinstance(case, PrefixConcatCase):
        return prefix_concat.choose(like(1, case.D), case.B * case.T).implementation
    layer = case.layer() if isinstance(case, BlockCase) else case
    weight, dropout = like(layer.N, layer.K), training and layer.dropout_p > 0
    if isinstance(layer, LoRALinearCase):
        return lora_linear.choose(like(layer.M, layer.K), weight, dropout).implementation
    return lora_linear.choose(like(layer.B * layer.T, layer.K), weight, dropout, mixed=True).implementation


def implementations(case: Case, training: bool, device: torch.device) -> list[str]:
    """The implementations worth timing here: first the one that `choose` takes, then every kernel of this device."""
    chosen = choice(case, training, device)
    if ops.forced is not None:
        return [chosen]
    return [chosen, *(name for name in ops.candidates(case.operator, device, case.dtype) if name != chosen)]


def random_tensor(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype)


class LoRALayer(NamedTuple):
    """The tensors of a frozen layer with its adapters; every A and B requires a gradient, and x in training."""

    x: Tensor  # [M, K] or [B, T, K]
    weight: Tensor  # [N, K]
    bias: Tensor | None  # [N]
    lora_a: list[Tensor]  # S of [R_i, K]
    lora_b: list[Tensor]  # S of [N, R_i]
    dy: Tensor  # as x, [..., N]


def make_layers(
    case: LoRALinearCase | MultiLoRACase, training: bool, device: torch.device, take_turns: bool = False
) -> list[LoRALayer]:
    """One layer, or as many as take turns, each with weights of its own, which have x, bias and dy in common."""
    rows: tuple[int, ...]
    if isinstance(case, LoRALinearCase):
        rows, ranks, with_bias = (case.M,), [case.R], case.bias
    else:
        rows, ranks, with_bias = (case.B, case.T), [*case.ranks], False
    K, N, copies = case.K, case.N, 1
    if take_turns and math.prod(rows) <= ROWS_FROM_MEMORY:
        cache = FROM_MEMORY if device.type == "cuda" else 2 * last_level_cache()
        copies = min(MOST_COPIES, 1 + int(cache // (N * K * case.dtype.itemsize)))

    def draw(*shape: int, inner: int = 1, dtype: torch.dtype = case.dtype) -> Tensor:
        return random_tensor(*shape, dtype=dtype, device=device, scale=inner**-0.5)

    def adapters(*shapes: tuple[int, int]) -> list[Tensor]:
        return [nn.Parameter(draw(*shape, inner=shape[1], dtype=case.adapter_dtype)) for shape in shapes]

    x, dy = draw(*rows, K).requires_grad_(training), draw(*rows, N)
    bias = draw(N) if with_bias else None
    every_a, every_b = [(R, K) for R in ranks], [(N, R) for R in ranks]
    return [LoRALayer(x, draw(N, K, inner=K), bias, adapters(*every_a), adapters(*every_b), dy) for _ in range(copies)]


def peft_layer(one: LoRALayer, dropout_p: float, training: bool) -> nn.Module:
    """PEFT's own lora.Linear over these tensors, its adapters named "0", "1", ..."""
    base = nn.Linear(one.weight.shape[1], one.weight.shape[0], bias=one.bias is not None, device="meta")
    base.weight = nn.Parameter(one.weight, requires_grad=False)
    if one.bias is not None:
        base.bias = nn.Parameter(one.bias, requires_grad=False)
    model: Any = nn.Sequential(collections.OrderedDict(layer=base))
    for i, (a, b) in enumerate(zip(one.lora_a, one.lora_b, strict=True)):
        config = peft.LoraConfig(r=len(a), lora_alpha=SCALE * len(a), lora_dropout=dropout_p, target_modules=["layer"])
        if i == 0:
            model = peft.get_peft_model(model, config, adapter_name="0", autocast_adapter_dtype=False)
        else:
            model.add_adapter(str(i), config, autocast_adapter_dtype=False)
        model.base_model.model.layer.get_submodule(f"lora_A.{i}").weight = a
        model.base_model.model.layer.get_submodule(f"lora_B.{i}").weight = b
    layer: nn.Module = model.base_model.model.layer
    return layer.train(training)


def _packed(x: Tensor, weights: Sequence[Tensor], dy: Tensor | None) -> Rival:
    """The frozen products alone, y and (with a dy) dx, on copies of the weights in oneDNN's own layout."""
    pack, multiply = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise

    @functools.cache
    def copies_of(copy: int) -> list[Tensor]:
        weight = weights[copy]
        return [pack(weight, len(x)), *([] if dy is None else [pack(weight.t().contiguous(), len(x))])]

    def call(copy: int) -> list[Tensor]:
        operands = (x.detach(), dy)
        return [
            multiply(operand, packed, None, "none", [], "")
            for operand, packed in zip(operands, copies_of(copy), strict=False)
        ]

    return Rival(call, [])


def _can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class AddmmFunction(torch.autograd.Function):
    """The adapter beside the frozen product by torch's own products, added in place: what Unsloth and Axolotl made of LoRA's layers."""

    @staticmethod
    def forward(
        ctx, x, dropped, weight, bias, lora_a, lora_b
    ):  # x [M, K]; dropped = d(x), or None where nothing is dropped
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


def _lora_linear(case: LoRALinearCase, training: bool, device: torch.device) -> Contest:
    layers = make_layers(case, training, device, take_turns=True)
    x, _, bias, _, _, dy = layers[0]
    merged = [
        torch.addmm(one.weight.float(), one.lora_b[0].detach().float(), one.lora_a[0].detach().float(), alpha=SCALE)
        for one in layers
    ]
    merged = [weight.to(case.dtype) for weight in merged]
    p = case.dropout_p if training else 0.0
    adapted, fused = ([peft_layer(one, p, training) for one in layers] for _ in range(2))
    compiled = [torch.compile(layer, dynamic=False) for layer in adapted]
    addmm = [AddmmLinear(layer).train(training) for layer in adapted]
    for layer in fused:
        fastlora.accelerate(layer)
    only_x = [[x]] * len(layers)
    all_three = [[x, *one.lora_a, *one.lora_b] for one in layers]
    rivals = {
        "frozen": Rival(lambda copy: F.linear(x, layers[copy].weight, bias), only_x),
        "packed": _packed(x, [one.weight for one in layers], dy if training else None),
        "merged": Rival(lambda copy: F.linear(x, merged[copy], bias), only_x),
        "addmm": Rival(lambda copy: addmm[copy](x), all_three),
        "peft": Rival(lambda copy: adapted[copy](x), all_three),
        "compiled": Rival(lambda copy: compiled[copy](x), all_three),
        FASTLORA: Rival(lambda copy: fused[copy](x), all_three),
    }
    if not _can_pack(case.dtype, device):
        del rivals["packed"]
    return Contest(len(layers), rivals, dy)


class Siblings(nn.Module):
    """Linear layers (in-features, out-features) by name that read one x, but the last of them, which reads another."""

    def __init__(self, **sizes: tuple[int, int]) -> None:
        super().__init__()
        for name, (K, N) in sizes.items():
            self.add_module(name, nn.Linear(K, N, bias=False))

    def forward(self, x: Tensor, of_last: Tensor) -> list[Tensor]:
        *shared, last = self.children()
        return [*(layer(x) for layer in shared), last(of_last)]


class Block(nn.Module):
    """The seven linear layers of a Llama block, without attention and activation: each x is given from outside."""

    def __init__(self, case: BlockCase) -> None:
        super().__init__()
        square, narrow = (case.hidden, case.hidden), (case.hidden, case.kv_width)
        wide, back = (case.hidden, case.intermediate), (case.intermediate, case.hidden)
        self.self_attn = Siblings(q_proj=square, k_proj=narrow, v_proj=narrow, o_proj=square)
        self.mlp = Siblings(gate_proj=wide, up_proj=wide, down_proj=back)
        self.to(case.dtype).requires_grad_(False)

    def forward(self, x: Tensor, attended: Tensor, normed: Tensor, activated: Tensor) -> list[Tensor]:
        return [*self.self_attn(x, attended), *self.mlp(normed, activated)]


def make_block(case: BlockCase, with_adapters: bool, device: torch.device) -> nn.Module:
    """The block, seeded; with PEFT's adapters, in the case's dtypes, their B not zero."""
    torch.manual_seed(0)
    with device:
        block = Block(case)
    if not with_adapters:
        return block
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    alpha, p = SCALE * case.R, case.dropout_p
    config = peft.LoraConfig(r=case.R, lora_alpha=alpha, lora_dropout=p, target_modules=names, init_lora_weights=False)
    model: Any = peft.get_peft_model(block, config, autocast_adapter_dtype=case.adapter_dtype == torch.float32)
    return model.base_model.model


def block_inputs(case: BlockCase, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """(the four activations that the layers read, the seven gradients of what they write)."""
    torch.manual_seed(1)
    inputs = [case.hidden] * 3 + [case.intermediate]
    outputs = [case.hidden, *[case.kv_width] * 2, case.hidden, *[case.intermediate] * 2, case.hidden]
    activations, gradients = (
        [random_tensor(case.M, width, dtype=case.dtype, device=device) for width in widths]
        for widths in (inputs, outputs)
    )
    return [activation.requires_grad_() for activation in activations], gradients


def _block(case: BlockCase, device: torch.device) -> Contest:
    """In training, its layers frozen, with PEFT's adapters, by addmm, and accelerated."""
    inputs, gradients = block_inputs(case, device)
    blocks = {"frozen": make_block(case, False, device)}
    blocks |= {name: make_block(case, True, device) for name in ("addmm", "peft", FASTLORA)}
    fastlora.accelerate(blocks[FASTLORA])
    for name, layer in list(blocks["addmm"].named_modules()):
        if isinstance(layer, peft.tuners.lora.Linear):
            blocks["addmm"].set_submodule(name, AddmmLinear(layer))
    blocks["compiled"] = torch.compile(blocks["peft"], dynamic=False)  # type: ignore[assignment]

    def rival(block: nn.Module) -> Rival:
        trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
        return Rival(lambda _: block(*inputs), [[*inputs, *trained]])

    names = ("frozen", "addmm", "peft", "compiled", FASTLORA)
    return Contest(1, {name: rival(blocks[name]) for name in names}, gradients)


def build_for_card(case: LoRALinearCase | BlockCase, device: torch.device) -> Contest:
    """A training contest with 16-bit adapters, and PEFT and fastlora also with float32 adapters under autocast, as PEFT trains by default."""

    def under_autocast(rival: Rival) -> Rival:
        def call(copy: int) -> Outputs:
            with torch.autocast(device.type, case.dtype):
                return rival.call(copy)

        return Rival(call, rival.leaves)

    wide, own = (build(replace(case, adapter_dtype=dtype), True, device) for dtype in (torch.float32, case.dtype))
    rivals = {name: rival for name, rival in own.rivals.items() if name != "packed"}
    rivals |= {name + FLOAT32: under_autocast(wide.rivals[name]) for name in ("peft", FASTLORA)}
    return own._replace(rivals=rivals)


def _multi_lora(case: MultiLoRACase, training: bool, device: torch.device) -> Contest:
    layers = make_layers(case, training, device, take_turns=True)
    x, p = layers[0].x, case.dropout_p if training else 0.0
    adapted = [peft_layer(one, p, training) for one in layers]
    examples = case.adapters_of_examples()
    names = ["__base__" if i < 0 else str(i) for i in examples]
    # A model groups the rows once per forward, for all its layers.
    groups = functional.group_rows(torch.tensor(examples, device=device), len(case.ranks))
    scales = [SCALE] * len(case.ranks)

    def fused(copy: int) -> Tensor:
        _, weight, _, lora_a, lora_b, _ = layers[copy]
        return functional.multi_lora(x, weight, None, lora_a, lora_b, scales, groups, dropout_p=p, training=training)

    used = sorted({i for i in examples if i >= 0})  # autograd.grad refuses PEFT's adapters without rows
    leaves = [[x, *(one.lora_a[i] for i in used), *(one.lora_b[i] for i in used)] for one in layers]
    rivals = {
        "frozen": Rival(lambda copy: F.linear(x, layers[copy].weight), [[x]] * len(layers)),
        "peft": Rival(lambda copy: adapted[copy](x, adapter_names=names), leaves),
        FASTLORA: Rival(fused, leaves),
    }
    return Contest(len(layers), rivals, layers[0].dy)


class PromptBatch(NamedTuple):
    """The tensors of a prefix_concat case: a full batch, where PEFT's way and fastlora's give the same."""

    prompts: Tensor  # [S, P, D]
    prompt_index: Tensor  # [B]
    input_ids: Tensor  # [B, T]
    embedding: Tensor  # [V, D]
    attention_mask: Tensor  # [B, T]
    labels: Tensor  # [B, T]


def make_prompt_batch(case: PrefixConcatCase, device: torch.device) -> PromptBatch:
    ids = torch.randint(case.V, (case.B, case.T), device=device)
    return PromptBatch(
        nn.Parameter(random_tensor(case.S, case.P, case.D, dtype=case.prompt_dtype, device=device)),
        torch.arange(case.B, device=device) % case.S,
        ids,
        random_tensor(case.V, case.D, dtype=case.dtype, device=device),
        torch.ones_like(ids),
        ids.clone(),
    )


def _concat_as_peft(batch: PromptBatch) -> tuple[Tensor, Tensor, Tensor]:
    """As PEFT's PeftModelForCausalLM does prompt tuning, and with a prompt of its own for each row where S > 1."""
    S, P, _ = batch.prompts.shape
    B = len(batch.input_ids)
    embeds = F.embedding(batch.input_ids, batch.embedding)
    prompts = batch.prompts.expand(B, -1, -1) if S == 1 else batch.prompts[batch.prompt_index]
    mask = torch.cat((batch.attention_mask.new_ones(B, P), batch.attention_mask), 1)
    labels = torch.cat((batch.labels.new_full((B, P), -100), batch.labels), 1)
    return torch.cat((prompts.to(embeds.dtype), embeds), 1), mask, labels


def concat_fused(batch: PromptBatch) -> Callable[[], functional.Prefixed]:
    """As fastlora does it."""
    given = batch._asdict()
    prompts, mask = given.pop("prompts"), given.pop("attention_mask")
    return functools.partial(functional.prefix_concat, prompts, None, mask, **given)


def _prefix_concat(case: PrefixConcatCase, training: bool, device: torch.device) -> Contest:
    batch = make_prompt_batch(case, device)
    compiled, fused = torch.compile(_concat_as_peft, dynamic=False), concat_fused(batch)
    leaves = [[batch.prompts]]
    rivals = {
        "frozen": Rival(lambda _: F.embedding(batch.input_ids, batch.embedding), []),
        "peft": Rival(lambda _: _concat_as_peft(batch)[0], leaves),
        "compiled": Rival(lambda _: compiled(batch)[0], leaves),
        FASTLORA: Rival(lambda _: fused().embeds, leaves),
    }
    return Contest(1, rivals, random_tensor(case.B, case.T + case.P, case.D, dtype=case.dtype, device=device))


def build(case: Case | BlockCase, training: bool, device: torch.device) -> Contest:
    """The case in memory, seeded, with its rivals; a block is trained."""
    torch.manual_seed(0)
    torch.compiler.reset()  # a case must not be slowed by the graphs compiled for the cases before it
    if isinstance(case, BlockCase):
        return _block(case, device)
    if isinstance(case, LoRALinearCase):
        return _lora_linear(case, training, device)
    if isinstance(case, MultiLoRACase):
        return _multi_lora(case, training, device)
    return _prefix_concat(case, training, device)
