"""What is measured: the shapes of real models and some odd ones, and the work that each of them cannot avoid.

    M rows of x   K in-features   N out-features   R rank   S adapters
    B batch rows   T tokens a row   P prompt length   D embedding width   V vocabulary

"8B" is Llama-3-8B (hidden 4096, intermediate 14336, key-value width 1024), "0.1B" SmolLM-135M (576, 1536). A case is
measured in one or both passes: "forward" as inference runs it (no dropout, no graph), "forward+backward" as training
does (gradients of x, A and B, or of the prompts). float32 adapters on a 16-bit base are PEFT's default.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch

FORWARD, TRAINING = "forward", "forward+backward"
BOTH = (FORWARD, TRAINING)

float32, bfloat16 = torch.float32, torch.bfloat16


class Work(NamedTuple):
    """What a pass must do at least: every product once, every tensor that it must touch once."""

    flops: int
    bytes: int


def dtype_name(dtype: torch.dtype) -> str:
    """torch.float32 -> "float32"."""
    return str(dtype).removeprefix("torch.")


def llama_linears(hidden: int, kv_width: int, intermediate: int) -> dict[str, tuple[int, int]]:
    """(in-features, out-features) of the seven linear layers of a Llama block, those of attention first."""
    square, narrow, wide = (hidden, hidden), (hidden, kv_width), (hidden, intermediate)
    attention = {"q_proj": square, "k_proj": narrow, "v_proj": narrow, "o_proj": square}
    return attention | {"gate_proj": wide, "up_proj": wide, "down_proj": (intermediate, hidden)}


@dataclass(frozen=True)
class Case(ABC):
    """A size of an operator, or of several, in which its rivals are timed."""

    name: str
    dtype: torch.dtype
    adapter_dtype: torch.dtype  # of what is trained
    operator: ClassVar[str]  # one of OPERATORS
    passes: tuple[str, ...] = field(default=BOTH, kw_only=True)
    trained: ClassVar[str] = "A and B"

    @abstractmethod
    def shape(self, training: bool) -> str:
        """The sizes in words, with what is dropped in training."""

    def title(self, training: bool) -> str:
        return f"{self.name}, {self.shape(training)}, {self.number_format()}"

    def number_format(self) -> str:
        base, trained = dtype_name(self.dtype), dtype_name(self.adapter_dtype)
        return base if base == trained else f"{base}, {self.trained} {trained}"


class OperatorCase(Case):
    """A case of one operator."""

    @abstractmethod
    def work(self, training: bool) -> Work:
        """What one pass cannot avoid."""


class LoRACase(Case):
    """What the cases with low-rank adapters have in common."""

    M: int
    K: int
    N: int
    dropout_p: float  # in training

    @property
    def rows(self) -> tuple[int, ...]:
        """Of x, which is [*rows, in-features]."""
        return (self.M,)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(in-features, out-features) by name."""
        return {"layer": (self.K, self.N)}

    def dropout(self, training: bool) -> str:
        return f" p {self.dropout_p:g}" if training and self.dropout_p else ""

    def linear_work(self, M: int, K: int, N: int, adapter: int, rank_rows: int, training: bool) -> Work:
        """adapter: elements of all A and B; rank_rows: the rows' ranks in all."""
        size, adapter_size = self.dtype.itemsize, self.adapter_dtype.itemsize
        flops = 2 * M * K * N + 2 * rank_rows * (K + N)
        moved = size * (M * K + N * K + M * N) + adapter_size * adapter
        if training:
            flops += 2 * M * K * N + 4 * rank_rows * (K + N)
            # dy, W, x again (for dA), dx; A and B read, their gradients written.
            moved += size * (M * N + N * K + 2 * M * K) + 2 * adapter_size * adapter
        return Work(flops, moved)


@dataclass(frozen=True)
class LoRALinearCase(LoRACase, OperatorCase):
    M: int
    K: int
    N: int
    R: int
    dropout_p: float = 0.05
    bias: bool = False
    operator: ClassVar[str] = "lora_linear"

    def shape(self, training: bool) -> str:
        return f"M {self.M}, {self.K} to {self.N}, R {self.R}{self.dropout(training)}{', bias' if self.bias else ''}"

    def work(self, training: bool) -> Work:
        return self.linear_work(self.M, self.K, self.N, self.R * (self.K + self.N), self.M * self.R, training)


@dataclass(frozen=True)
class MultiLoRACase(LoRACase, OperatorCase):
    B: int
    T: int
    K: int
    N: int
    ranks: tuple[int, ...]  # S
    dropout_p: float = 0.05
    passes: tuple[str, ...] = field(default=(FORWARD,), kw_only=True)
    operator: ClassVar[str] = "multi_lora"

    @property
    def rows(self) -> tuple[int, ...]:
        return self.B, self.T

    def adapters_of_examples(self) -> list[int]:
        """[B]: an adapter each where there are enough, else none and every adapter in turn."""
        S = len(self.ranks)
        return [b % S if self.B <= S else b % (S + 1) - 1 for b in range(self.B)]

    def shape(self, training: bool) -> str:
        low, high = min(self.ranks), max(self.ranks)
        rank = f"{low}" if low == high else f"{low} to {high}"
        size = f"B {self.B}, T {self.T}, {self.K} to {self.N}, S {len(self.ranks)}"
        return f"{size}, R {rank}{self.dropout(training)}"

    def work(self, training: bool) -> Work:
        used = [i for i in self.adapters_of_examples() if i >= 0]
        adapter = sum(self.ranks[i] for i in set(used)) * (self.K + self.N)
        rank_rows = self.T * sum(self.ranks[i] for i in used)
        return self.linear_work(self.B * self.T, self.K, self.N, adapter, rank_rows, training)


@dataclass(frozen=True)
class PrefixConcatCase(OperatorCase):
    B: int
    T: int
    S: int  # prompts; row b has prompt b mod S
    P: int
    D: int
    V: int
    operator: ClassVar[str] = "prefix_concat"
    trained: ClassVar[str] = "prompts"

    def shape(self, training: bool) -> str:
        return f"B {self.B}, T {self.T}, P {self.P}, D {self.D}{f', S {self.S}' if self.S > 1 else ''}"

    def work(self, training: bool) -> Work:
        prompts = self.S * self.P * self.D * self.adapter_dtype.itemsize
        moved = prompts + self.B * (2 * self.T + self.P) * self.D * self.dtype.itemsize
        if training:  # the prompts' part of the gradient, summed over the batch; the embedding is frozen
            moved += prompts + self.B * self.P * self.D * self.dtype.itemsize
        return Work(self.B * self.P * self.D if training else 0, moved)


@dataclass(frozen=True)
class StepCase(LoRACase):
    """One step of a Llama of this size with random weights, LoRA on all linear layers, half of each row prompt unless told."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    batch: int
    tokens: int
    R: int
    dropout_p: float
    rounds: int
    prompt_part: float = 0.5

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Of one layer."""
        return llama_linears(self.hidden, self.hidden // self.heads * self.kv_heads, self.intermediate)

    @property
    def prompt(self) -> int:
        """Tokens of a row that carry no label."""
        return int(self.tokens * self.prompt_part)

    def weight_bytes(self) -> int:
        """Of the frozen weights alone: the linear layers, the embeddings and the head."""
        layer = sum(K * N for K, N in self.linears.values())
        return self.dtype.itemsize * (self.layers * layer + 2 * self.vocabulary * self.hidden)

    def flops(self) -> int:
        """Of the matrix products that a step must compute, forward and backward: the linear layers (a frozen weight has no gradient, nor
        have the embeddings), the adapters, attention up to the diagonal, and the head on the positions whose next token is labelled."""
        M, layer = self.batch * self.tokens, self.linears
        total = self.layers * sum(4 * M * K * N + 6 * M * self.R * (K + N) for K, N in layer.values())
        for name in ("q_proj", "k_proj", "v_proj"):  # of the first layer, no dx: what is below is frozen
            K, N = layer[name]
            total -= 2 * M * K * N + 2 * M * self.R * K
        pairs = self.tokens * (self.tokens + 1) // 2
        total += self.layers * 6 * 2 * self.batch * pairs * self.hidden
        labelled = self.batch * (self.tokens - self.prompt)
        return total + 4 * labelled * self.hidden * self.vocabulary

    def shape(self, training: bool = True) -> str:
        size = f"hidden {self.hidden}, {self.layers} layers, V {self.vocabulary}"
        return f"{size}, {self.batch} x {self.tokens} tokens, R {self.R}{self.dropout(training)}"


@dataclass(frozen=True)
class BlockCase(LoRACase):
    """The seven linear layers of one Llama block, forward and backward: q, k and v share their x, gate and up theirs."""

    M: int
    hidden: int
    intermediate: int
    kv_width: int
    R: int
    dropout_p: float = 0.05
    passes: tuple[str, ...] = field(default=(TRAINING,), kw_only=True)
    operator: ClassVar[str] = "lora_linear"

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        return llama_linears(self.hidden, self.kv_width, self.intermediate)

    def shape(self, training: bool) -> str:
        widths = f"{self.hidden}, {self.kv_width} and {self.intermediate} wide"
        return f"M {self.M}, {widths}, R {self.R}{self.dropout(training)}"


class Cases(NamedTuple):
    """Of an operator, or of the training step."""

    on_cpu: tuple[Any, ...]
    on_cuda: tuple[Any, ...]
    quick: int = 2  # the first ones of each, where there is little time
    seconds: float = 30.0  # of timing alone, on all cases
    rivals: tuple[str, ...] = ()  # who is timed; the first one is the baseline of every ratio
    baseline: str = "the frozen layer alone"
    uncapturable: tuple[str, ...] = ()  # what no CUDA graph can hold


EIGHT = (16,) * 8
MIXED = (4, 8, 8, 16, 16, 32, 64, 1)

# One forward+backward row of 8B at 512 rows costs a 2-core CPU a second: the CPU's 8B cases have few rows.
OPERATORS: dict[str, Cases] = {
    "lora_linear": Cases(
        rivals=("frozen", "packed", "merged", "addmm", "peft", "compiled", "fastlora"),
        on_cpu=(
            LoRALinearCase("0.1B gate_proj", float32, float32, 512, 576, 1536, 16),
            LoRALinearCase("odd", float32, float32, 37, 1001, 769, 3, 0.1, bias=True),
            LoRALinearCase("0.1B gate_proj, decode", float32, float32, 1, 576, 1536, 16, passes=(FORWARD,)),
            LoRALinearCase("8B q_proj, decode", bfloat16, bfloat16, 1, 4096, 4096, 16, passes=(FORWARD,)),
            LoRALinearCase("8B down_proj, decode", bfloat16, float32, 4, 14336, 4096, 16, passes=(FORWARD,)),
            LoRALinearCase("0.1B gate_proj", bfloat16, float32, 512, 576, 1536, 16),
            LoRALinearCase("0.1B down_proj", float32, float32, 512, 1536, 576, 64),
            LoRALinearCase("8B k_proj", bfloat16, bfloat16, 512, 4096, 1024, 16),
            LoRALinearCase("8B q_proj", float32, float32, 64, 4096, 4096, 16),
        ),
        on_cuda=(
            LoRALinearCase("8B q_proj", bfloat16, bfloat16, 8192, 4096, 4096, 16, 0.1),
            LoRALinearCase("odd", bfloat16, bfloat16, 1001, 1003, 769, 3, 0.1, bias=True),
            LoRALinearCase("8B q_proj, decode", bfloat16, bfloat16, 1, 4096, 4096, 16, passes=(FORWARD,)),
            LoRALinearCase("8B down_proj, decode", bfloat16, bfloat16, 16, 14336, 4096, 16, passes=(FORWARD,)),
            LoRALinearCase("8B q_proj", bfloat16, float32, 8192, 4096, 4096, 16, 0.1),
            LoRALinearCase("8B k_proj", bfloat16, bfloat16, 8192, 4096, 1024, 16, 0.1),
            LoRALinearCase("8B gate_proj", bfloat16, bfloat16, 8192, 4096, 14336, 16, 0.1),
            LoRALinearCase("8B down_proj", bfloat16, bfloat16, 8192, 14336, 4096, 64, 0.1),
            LoRALinearCase("70B q_proj", bfloat16, bfloat16, 8192, 8192, 8192, 16, 0.1),
            LoRALinearCase("0.1B gate_proj", float32, float32, 8192, 576, 1536, 16, 0.1),
        ),
    ),
    "multi_lora": Cases(
        rivals=("frozen", "peft", "fastlora"),
        uncapturable=("peft",),  # its mixed batches index by Python lists, which are copied to the card in each call
        on_cpu=(
            MultiLoRACase("0.1B gate_proj, decode", float32, float32, 8, 1, 576, 1536, EIGHT),
            MultiLoRACase("odd", float32, float32, 5, 7, 1001, 769, (3, 1, 20), 0.1, passes=BOTH),
            MultiLoRACase("0.1B gate_proj, decode", bfloat16, bfloat16, 32, 1, 576, 1536, EIGHT),
            MultiLoRACase("8B q_proj, decode", bfloat16, bfloat16, 8, 1, 4096, 4096, MIXED),
            MultiLoRACase("0.1B gate_proj", float32, float32, 8, 128, 576, 1536, EIGHT, passes=BOTH),
            MultiLoRACase("0.1B gate_proj", bfloat16, float32, 8, 128, 576, 1536, MIXED, passes=BOTH),
        ),
        on_cuda=(
            MultiLoRACase("8B q_proj, decode", bfloat16, bfloat16, 8, 1, 4096, 4096, EIGHT),
            MultiLoRACase("odd", bfloat16, bfloat16, 5, 7, 1003, 769, (3, 1, 20), 0.1, passes=BOTH),
            MultiLoRACase("8B q_proj, decode", bfloat16, bfloat16, 64, 1, 4096, 4096, MIXED),
            MultiLoRACase("8B down_proj, decode", bfloat16, bfloat16, 64, 1, 14336, 4096, EIGHT),
            MultiLoRACase("8B q_proj", bfloat16, bfloat16, 8, 1024, 4096, 4096, MIXED, 0.1, passes=BOTH),
            MultiLoRACase("8B q_proj", bfloat16, float32, 8, 1024, 4096, 4096, EIGHT, 0.1, passes=BOTH),
        ),
    ),
    "prefix_concat": Cases(
        rivals=("frozen", "peft", "compiled", "fastlora"),
        baseline="the lookup of the token embeddings alone, which has no backward",
        on_cpu=(
            PrefixConcatCase("0.1B", float32, float32, 8, 128, 1, 100, 576, 49152),
            PrefixConcatCase("odd", float32, float32, 3, 37, 1, 7, 65, 1001),
            PrefixConcatCase("0.1B, a prompt each", float32, float32, 8, 128, 4, 100, 576, 49152),
            PrefixConcatCase("8B", bfloat16, float32, 4, 256, 1, 20, 4096, 32768),
        ),
        on_cuda=(
            PrefixConcatCase("8B", bfloat16, float32, 16, 1024, 1, 100, 4096, 128256),
            PrefixConcatCase("odd", bfloat16, bfloat16, 3, 37, 1, 7, 65, 1001),
            PrefixConcatCase("8B, a prompt each", bfloat16, bfloat16, 16, 1024, 4, 100, 4096, 128256),
            PrefixConcatCase("0.1B", float32, float32, 8, 128, 1, 100, 576, 49152),
        ),
        seconds=16.0,
    ),
}
STEP = Cases(
    on_cpu=(
        StepCase("small Llama", float32, float32, 256, 768, 4, 4, 2, 8192, 4, 128, 16, 0.0, 5),
        StepCase("0.1B Llama, 10 layers", float32, float32, 576, 1536, 10, 9, 3, 49152, 4, 256, 16, 0.05, 7),
        StepCase("0.1B Llama, 10 layers", bfloat16, float32, 576, 1536, 10, 9, 3, 49152, 4, 256, 16, 0.05, 7),
    ),
    on_cuda=(
        StepCase("small Llama", float32, float32, 256, 768, 4, 4, 2, 8192, 4, 128, 16, 0.0, 11),
        StepCase("1B Llama", bfloat16, float32, 2048, 8192, 16, 32, 8, 128256, 4, 1024, 16, 0.1, 11),
    ),
    quick=1,
)


def cases_of(name: str, device: torch.device, quick: bool = False) -> tuple[Any, ...]:
    """The cases of one of OPERATORS, or the training steps, on this kind of device."""
    cases = STEP if name == "step" else OPERATORS[name]
    found = cases.on_cuda if device.type == "cuda" else cases.on_cpu
    return found[: cases.quick] if quick else found


# What the goals of a layer on a CPU are checked on: narrow and wide, low and high rank; and one row.
GOAL_LAYERS = (
    *(
        LoRALinearCase("layer", dtype, dtype, M, K, N, R, passes=(TRAINING,))
        for dtype in (float32, bfloat16)
        for M, (K, N) in zip((1536, 384, 512), ((576, 1536), (1536, 576), (2048, 5632)), strict=True)
        for R in (16, 64, 256)
    ),
    *(
        LoRALinearCase("few rows", dtype, dtype, M, 4096, 4096, 16, passes=(FORWARD,))
        for dtype in (float32, bfloat16)
        for M in (1, 4, 8)
    ),
)
GOAL_CELLS = tuple(
    LoRALinearCase("cell", dtype, dtype, M, 576, 1536, R, passes=(FORWARD if M <= 8 else TRAINING,))
    for dtype in (float32, bfloat16, torch.float16)
    for M in (1, 8, 64, 512, 4096)
    for R in (1, 16, 64, 256)
)

# The same on a card: the sizes of issue and literature, so that figures can be laid side by side.
CARD_LAYERS = (
    LoRALinearCase("layer", bfloat16, bfloat16, 8192, 4096, 4096, 16, 0.1, passes=(TRAINING,)),
    LoRALinearCase("layer", bfloat16, bfloat16, 8192, 8192, 8192, 16, 0.1, passes=(TRAINING,)),
    LoRALinearCase("layer", bfloat16, bfloat16, 8192, 4096, 4096, 64, 0.1, passes=(TRAINING,)),
)
CARD_BLOCK = BlockCase("Llama-3-8B layer", bfloat16, bfloat16, 8192, 4096, 14336, 1024, 16, 0.1)
CARD_KERNEL = LoRALinearCase("main kernel", bfloat16, bfloat16, 4096, 4096, 4096, 16, passes=(FORWARD,))
CARD_DECODE = MultiLoRACase("decode", bfloat16, bfloat16, 32, 1, 4096, 4096, EIGHT)
CARD_PREFILL = MultiLoRACase("prefill", bfloat16, bfloat16, 8, 512, 4096, 4096, EIGHT)
CARD_ERRORS = tuple(
    LoRALinearCase("errors", bfloat16, adapter_dtype, 8192, 4096, 4096, 16, 0.0, passes=(TRAINING,))
    for adapter_dtype in (bfloat16, float32)
)
# 4096 tokens: what a card of 80 GiB holds of PEFT's activations beside the weights.
CARD_MODEL = StepCase(
    "Llama-3-8B", bfloat16, float32, 4096, 14336, 32, 32, 8, 128256, 1, 4096, 16, 0.1, rounds=5, prompt_part=0.0
)

# So small that a call is the host's work: checks, allocations, launches.
LAUNCHES = (
    LoRALinearCase("small layer", bfloat16, bfloat16, 4, 128, 128, 8, 0.1),
    LoRALinearCase("small layer", bfloat16, float32, 4, 128, 128, 8, 0.1),
    MultiLoRACase("small layer, 8 adapters", bfloat16, bfloat16, 4, 1, 128, 128, (8,) * 8),
)
