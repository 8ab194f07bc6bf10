"""Who is timed: every rival of an operator as a plain function of the same tensors.

A problem is one case in memory. Where a few rows meet a large weight, it holds several copies of the weights that
take turns, as the layers of a model do: a weight that is still in the cache from the last call would flatter
everyone.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlora
from fastlora import functional, ops
from fastlora.operators import lora_linear, prefix_concat

from .cases import BlockCase, Case, LoRALinearCase, MultiLoRACase, PrefixConcatCase
from .clock import Run
from .machine import last_level_cache

FASTLORA = "fastlora"
RIVALS = {  # the first one is the baseline of every ratio
    "lora_linear": ("frozen", "packed", "merged", "addmm", "peft", "compiled", FASTLORA),
    "multi_lora": ("frozen", "peft", FASTLORA),
    "prefix_concat": ("frozen", "peft", "compiled", FASTLORA),
}
SCALE = 2
FEW_ROWS = 64  # up to which a layer is bound by reading its weight
MOST_COPIES = 32
FROM_MEMORY = 200e6  # bytes of weights that no card's L2 cache holds
FLOAT32 = "32"  # added to a rival's name: the same with float32 adapters under autocast, PEFT's default

Outputs = Tensor | Sequence[Tensor]


class Rival(NamedTuple):
    call: Callable[[int], Outputs]  # the number of a copy -> y
    leaves: Sequence[Sequence[Tensor]]  # what training differentiates, for each copy; none: it has no backward


class Problem(NamedTuple):
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

        run = forward_and_backward if training and rival.leaves else forward
        return run if implementation is None else forced(run, implementation)


def forced(run: Callable[[int], Any], implementation: str | None) -> Callable[[int], Any]:
    """`run` with fastlora's operators forced to use that implementation; None: as `choose` says."""

    def forced_run(turn: int) -> Any:
        before, ops.forced = ops.forced, implementation
        try:
            return run(turn)
        finally:
            ops.forced = before

    return forced_run


def choice(case: Case, training: bool, device: torch.device) -> str:
    """The implementation that `choose` takes for the case's forward."""

    def like(rows: int, columns: int) -> Tensor:
        return torch.empty(1, 1, dtype=case.dtype, device=device).expand(rows, columns)

    if isinstance(case, PrefixConcatCase):
        return prefix_concat.choose(like(1, case.D), case.B * case.T).implementation
    weight, dropout = like(case.N, case.K), training and case.dropout_p > 0
    if isinstance(case, LoRALinearCase):
        return lora_linear.choose(like(case.M, case.K), weight, dropout).implementation
    return lora_linear.choose(like(case.B * case.T, case.K), weight, dropout, mixed=True).implementation


def implementations(operator: str, case: Case, training: bool, device: torch.device) -> list[str]:
    """The implementations worth timing here: first the one that `choose` takes, then every kernel of this device."""
    chosen = choice(case, training, device)
    if ops.forced is not None:
        return [chosen]
    return [chosen, *(name for name in kernels_of(operator, device) if name != chosen)]


def kernels_of(operator: str, device: torch.device) -> list[str]:
    """What is there for this device beside plain PyTorch."""
    names = ("triton", "cuda") if device.type == "cuda" else ("cpu",)
    return [name for name in names if _is_present(operator, name)]


def _is_present(operator: str, implementation: str) -> bool:
    try:
        ops.implementation(operator, implementation)
    except ops.ImplementationError:
        return False
    return True


def _copies(rows: int, weight_bytes: int, device: torch.device) -> int:
    if rows > FEW_ROWS:
        return 1
    cache = FROM_MEMORY if device.type == "cuda" else 2 * last_level_cache()
    return min(MOST_COPIES, 1 + int(cache // weight_bytes))


def random_tensor(*shape: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype)


def make_adapter(K: int, N: int, R: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    a = random_tensor(R, K, dtype=dtype, device=device, scale=K**-0.5)
    b = random_tensor(N, R, dtype=dtype, device=device, scale=R**-0.5)
    return nn.Parameter(a), nn.Parameter(b)


def peft_layer(
    weight: Tensor, bias: Tensor | None, adapters: Sequence[tuple[Tensor, Tensor]], dropout_p: float, training: bool
) -> nn.Module:
    """PEFT's own lora.Linear over these tensors, its adapters named "0", "1", ..."""
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    base.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        base.bias = nn.Parameter(bias, requires_grad=False)
    model: Any = nn.Sequential(collections.OrderedDict(layer=base))
    for i, (a, _) in enumerate(adapters):
        config = peft.LoraConfig(r=len(a), lora_alpha=SCALE * len(a), lora_dropout=dropout_p, target_modules=["layer"])
        if i == 0:
            model = peft.get_peft_model(model, config, adapter_name="0", autocast_adapter_dtype=False)
        else:
            model.add_adapter(str(i), config, autocast_adapter_dtype=False)
    layer: nn.Module = model.base_model.model.layer
    for i, (a, b) in enumerate(adapters):
        layer.get_submodule(f"lora_A.{i}").weight = a
        layer.get_submodule(f"lora_B.{i}").weight = b
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


def _lora_linear(case: LoRALinearCase, training: bool, device: torch.device) -> Problem:
    M, K, N = case.M, case.K, case.N
    copies = _copies(M, N * K * case.dtype.itemsize, device)
    weights = [random_tensor(N, K, dtype=case.dtype, device=device, scale=K**-0.5) for _ in range(copies)]
    adapters = [make_adapter(K, N, case.R, case.adapter_dtype, device) for _ in range(copies)]
    bias = random_tensor(N, dtype=case.dtype, device=device) if case.bias else None
    merged = [
        torch.addmm(w.float(), b.detach().float(), a.detach().float(), alpha=SCALE).to(case.dtype)
        for w, (a, b) in zip(weights, adapters, strict=True)
    ]
    x = random_tensor(M, K, dtype=case.dtype, device=device).requires_grad_(training)
    p = case.dropout_p if training else 0.0
    layers, fused = (
        [peft_layer(w, bias, [pair], p, training) for w, pair in zip(weights, adapters, strict=True)] for _ in range(2)
    )
    compiled = [torch.compile(layer, dynamic=False) for layer in layers]
    addmm = [AddmmLinear(layer).train(training) for layer in layers]
    for layer in fused:
        fastlora.accelerate(layer)
    dy = random_tensor(M, N, dtype=case.dtype, device=device)
    only_x = [[x]] * copies
    all_three = [[x, a, b] for a, b in adapters]
    rivals = {
        "frozen": Rival(lambda copy: F.linear(x, weights[copy], bias), only_x),
        "packed": _packed(x, weights, dy if training else None),
        "merged": Rival(lambda copy: F.linear(x, merged[copy], bias), only_x),
        "addmm": Rival(lambda copy: addmm[copy](x), all_three),
        "peft": Rival(lambda copy: layers[copy](x), all_three),
        "compiled": Rival(lambda copy: compiled[copy](x), all_three),
        FASTLORA: Rival(lambda copy: fused[copy](x), all_three),
    }
    if not _can_pack(case.dtype, device):
        del rivals["packed"]
    return Problem(copies, rivals, dy)


class Attention(nn.Module):
    """The linear layers of a Llama block's attention, without the attention."""

    def __init__(self, hidden: int, kv_width: int) -> None:
        super().__init__()
        self.q_proj, self.o_proj = (nn.Linear(hidden, hidden, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(hidden, kv_width, bias=False) for _ in range(2))

    def forward(self, x: Tensor, attended: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x), self.o_proj(attended)


class MLP(nn.Module):
    """The linear layers of a Llama block's MLP, without its activation."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(hidden, intermediate, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Tensor, activated: Tensor) -> tuple[Tensor, ...]:
        return self.gate_proj(x), self.up_proj(x), self.down_proj(activated)


class Block(nn.Module):
    """The seven linear layers of a Llama block, each x given from outside."""

    def __init__(self, case: BlockCase) -> None:
        super().__init__()
        self.self_attn = Attention(case.hidden, case.kv_width)
        self.mlp = MLP(case.hidden, case.intermediate)
        self.to(case.dtype).requires_grad_(False)

    def forward(self, x: Tensor, attended: Tensor, normed: Tensor, activated: Tensor) -> tuple[Tensor, ...]:
        return *self.self_attn(x, attended), *self.mlp(normed, activated)


def make_block(case: BlockCase, with_adapters: bool, device: torch.device) -> nn.Module:
    """The block, seeded; with PEFT's adapters, in the case's dtypes, their B not zero."""
    torch.manual_seed(0)
    with device:
        block = Block(case)
    if not with_adapters:
        return block
    names = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    config = peft.LoraConfig(
        r=case.R,
        lora_alpha=SCALE * case.R,
        lora_dropout=case.dropout_p,
        target_modules=names,
        init_lora_weights=False,
    )
    model: Any = peft.get_peft_model(block, config, autocast_adapter_dtype=case.adapter_dtype == torch.float32)
    return model.base_model.model


def block_inputs(case: BlockCase, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    """(the four activations that the layers read, the seven gradients of what they write)."""
    torch.manual_seed(1)
    inputs = [case.hidden] * 3 + [case.intermediate]
    outputs = [
        case.hidden,
        case.kv_width,
        case.kv_width,
        case.hidden,
        case.intermediate,
        case.intermediate,
        case.hidden,
    ]
    activations, gradients = (
        [random_tensor(case.M, width, dtype=case.dtype, device=device) for width in widths]
        for widths in (inputs, outputs)
    )
    return [activation.requires_grad_() for activation in activations], gradients


def build_block(case: BlockCase, device: torch.device) -> Problem:
    """The block in memory, its layers frozen, with PEFT's adapters, by addmm, and accelerated."""
    torch.compiler.reset()  # as in `build`
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
    return Problem(1, {name: rival(blocks[name]) for name in names}, gradients)


def build_for_card(case: LoRALinearCase | BlockCase, device: torch.device) -> Problem:
    """A training problem with 16-bit adapters, and PEFT and fastlora also with float32 adapters under autocast, as PEFT trains by default."""

    def under_autocast(rival: Rival) -> Rival:
        def call(copy: int) -> Outputs:
            with torch.autocast(device.type, case.dtype):
                return rival.call(copy)

        return Rival(call, rival.leaves)

    wide, own = (
        build_block(one, device) if isinstance(one, BlockCase) else build(one, True, device)
        for one in (replace(case, adapter_dtype=torch.float32), replace(case, adapter_dtype=case.dtype))
    )
    rivals = {name: rival for name, rival in own.rivals.items() if name != "packed"}
    rivals |= {name + FLOAT32: under_autocast(wide.rivals[name]) for name in ("peft", FASTLORA)}
    return own._replace(rivals=rivals)


def _multi_lora(case: MultiLoRACase, training: bool, device: torch.device) -> Problem:
    K, N = case.K, case.N
    copies = _copies(case.B * case.T, N * K * case.dtype.itemsize, device)
    weights = [random_tensor(N, K, dtype=case.dtype, device=device, scale=K**-0.5) for _ in range(copies)]
    adapters = [[make_adapter(K, N, r, case.adapter_dtype, device) for r in case.ranks] for _ in range(copies)]
    x = random_tensor(case.B, case.T, K, dtype=case.dtype, device=device).requires_grad_(training)
    p = case.dropout_p if training else 0.0
    layers = [peft_layer(w, None, group, p, training) for w, group in zip(weights, adapters, strict=True)]
    examples = case.adapters_of_examples()
    names = ["__base__" if i < 0 else str(i) for i in examples]
    # A model groups the rows once per forward, for all its layers.
    groups = functional.group_rows(torch.tensor(examples, device=device), len(case.ranks))
    every_a = [[a for a, _ in group] for group in adapters]
    every_b = [[b for _, b in group] for group in adapters]
    scales = [SCALE] * len(case.ranks)

    def fused(copy: int) -> Tensor:
        lora_a, lora_b = every_a[copy], every_b[copy]
        return functional.multi_lora(
            x, weights[copy], None, lora_a, lora_b, scales, groups, dropout_p=p, training=training
        )

    used = sorted({i for i in examples if i >= 0})  # autograd.grad refuses PEFT's adapters without rows
    leaves = [[x, *(a[i] for i in used), *(b[i] for i in used)] for a, b in zip(every_a, every_b, strict=True)]
    rivals = {
        "frozen": Rival(lambda copy: F.linear(x, weights[copy]), [[x]] * copies),
        "peft": Rival(lambda copy: layers[copy](x, adapter_names=names), leaves),
        FASTLORA: Rival(fused, leaves),
    }
    return Problem(copies, rivals, random_tensor(case.B, case.T, N, dtype=case.dtype, device=device))


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


def _concat_fused(batch: PromptBatch) -> Tensor:
    return functional.prefix_concat(
        batch.prompts,
        None,
        batch.attention_mask,
        input_ids=batch.input_ids,
        embedding=batch.embedding,
        prompt_index=batch.prompt_index,
        labels=batch.labels,
    ).embeds


def _prefix_concat(case: PrefixConcatCase, training: bool, device: torch.device) -> Problem:
    batch = make_prompt_batch(case, device)
    compiled = torch.compile(_concat_as_peft, dynamic=False)
    leaves = [[batch.prompts]]
    rivals = {
        "frozen": Rival(lambda _: F.embedding(batch.input_ids, batch.embedding), []),
        "peft": Rival(lambda _: _concat_as_peft(batch)[0], leaves),
        "compiled": Rival(lambda _: compiled(batch)[0], leaves),
        FASTLORA: Rival(lambda _: _concat_fused(batch), leaves),
    }
    return Problem(1, rivals, random_tensor(case.B, case.T + case.P, case.D, dtype=case.dtype, device=device))


def build(case: Case, training: bool, device: torch.device) -> Problem:
    """The case in memory, seeded, with its rivals."""
    torch.manual_seed(0)
    torch.compiler.reset()  # a case must not be slowed by the graphs compiled for the cases before it
    if isinstance(case, LoRALinearCase):
        return _lora_linear(case, training, device)
    if isinstance(case, MultiLoRACase):
        return _multi_lora(case, training, device)
    return _prefix_concat(case, training, device)
