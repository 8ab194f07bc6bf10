"""Modules over fastlora.functional, for models without PEFT: they hold state and options, no arithmetic but the merge.

LoRALinear, LoRAConv1D     a frozen layer and its LoRA update
MultiLoRALinear            a frozen layer and several adapters, one for each row of a mixed batch
SoftPrompt                 trainable rows in front of a batch
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Self, TypedDict, TypeVar, Unpack

import torch
from torch import Tensor, nn

from fastlora import functional
from fastlora.checks import wrong
from fastlora.functional import Prefixed, RowGroups

Layer = TypeVar("Layer", bound=nn.Module)

BASE = "__base__"
"""The adapter name that means no adapter, as in PEFT's `adapter_names`."""


def lora_scaling(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """s = alpha / r (Hu et al. 2021, section 4.1), or alpha / sqrt(r) with rank-stabilised LoRA (Kalajdzievski 2023, section 3)."""
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


class LoRAOptions(TypedDict, total=False):
    """What an adapter is made with beside its rank; the names and defaults are PEFT's but for alpha's and dropout's."""

    lora_alpha: float  # 32
    lora_dropout: float  # a probability of at least 0 and less than 1: 0.05
    use_rslora: bool  # see lora_scaling: False


def _require_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: got {value!r}, expected an integer of at least 1")


def _new_adapter(
    weight: Tensor, r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool
) -> tuple[nn.Parameter, nn.Parameter, float]:
    """(A, B, s): A [R, K] Kaiming-uniform and B [N, R] zero, as PEFT begins; float32 beside a 16-bit weight [N, K], the weight's dtype else."""
    _require_counts(r=r)
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout: got {lora_dropout!r}, expected a probability of at least 0 and less than 1")
    out_features, in_features = weight.shape
    dtype = torch.float32 if weight.dtype in (torch.bfloat16, torch.float16) else weight.dtype
    lora_a = torch.empty(r, in_features, dtype=dtype, device=weight.device)
    nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
    lora_b = torch.zeros(out_features, r, dtype=dtype, device=weight.device)
    return nn.Parameter(lora_a), nn.Parameter(lora_b), lora_scaling(r, lora_alpha, use_rslora)


def _around(cls: type[Layer], base: Any, **sizes: int) -> Layer:
    """A bare layer of the class, of those sizes, that shares the base's Parameters, frozen."""
    layer: Any = cls.__new__(cls)
    nn.Module.__init__(layer)
    vars(layer).update(sizes)
    layer.weight, layer.bias = base.weight, base.bias
    return layer.requires_grad_(False).train(base.training)


def _around_linear(cls: type[Layer], linear: nn.Linear) -> Layer:
    if not isinstance(linear, nn.Linear):
        raise TypeError(f"linear: got {type(linear).__name__}, expected an nn.Linear")
    return _around(cls, linear, in_features=linear.in_features, out_features=linear.out_features)


class _Mergeable(nn.Module):
    """One adapter beside a frozen `weight`, and the exact way into the weight and back.

    While merged, `weight` is a Parameter of the layer's own that holds W + s B A, and the original is kept aside, untouched: others may share
    it (an embedding tied to this layer). `unmerge` puts the very same Parameter back, and `state_dict` holds the original, so that a saved
    state means the same merged or not.
    """

    weight: Any  # nn.Parameter [N, K], or [K, N] in a Conv1D
    bias: Any  # nn.Parameter [N] or None
    lora_A: nn.Parameter  # [R, K]
    lora_B: nn.Parameter  # [N, R]
    _aside: tuple[nn.ParameterList, ...]  # of the original weight; a tuple keeps it out of the layer's own parameters

    def _add_adapter(
        self, r: int, lora_alpha: float = 32, lora_dropout: float = 0.05, use_rslora: bool = False
    ) -> Self:
        """The layer itself, with a new adapter beside its weight."""
        new = _new_adapter(self._weight_as_linear(), r, lora_alpha, lora_dropout, use_rslora)
        self.requires_grad_(False)
        self.r, self.lora_alpha, self.lora_dropout, self.use_rslora = r, lora_alpha, lora_dropout, use_rslora
        self.lora_A, self.lora_B, self.scaling = new
        self._aside = ()
        return self

    def _weight_as_linear(self) -> Tensor:
        """The weight as [N, K]."""
        return self.weight

    @property
    def merged(self) -> bool:
        return bool(self._aside)

    def merge(self) -> None:
        """Put W + s B A, computed in float32 or wider and rounded once, in the weight's place. A second call changes nothing."""
        if self.merged:
            return
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        update = self.scaling * (self.lora_B.detach().to(wide) @ self.lora_A.detach().to(wide))  # [N, K]
        merged = (self._weight_as_linear().detach().to(wide) + update).to(self.weight.dtype)
        transposed = self._weight_as_linear() is not self.weight
        self._aside = (nn.ParameterList([self.weight]),)
        self.weight = nn.Parameter(merged.t().contiguous() if transposed else merged, requires_grad=False)

    def unmerge(self) -> None:
        """Put the original Parameter back, bit for bit. A second call changes nothing."""
        if self._aside:
            self.weight = self._aside[0][0]
            self._aside = ()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        for aside in self._aside:
            aside._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for aside in self._aside:
            destination[prefix + "weight"] = aside[0] if keep_vars else aside[0].detach()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unmerge()
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        weight, bias = self._weight_as_linear(), self.bias
        if self.merged:
            return nn.functional.linear(x, weight, bias)
        return functional.lora_linear(
            x, weight, bias, self.lora_A, self.lora_B, self.scaling, dropout_p=self.lora_dropout, training=self.training
        )

    def _options(self) -> str:
        return (
            f"r={self.r}, lora_alpha={self.lora_alpha}, lora_dropout={self.lora_dropout}, use_rslora={self.use_rslora}"
        )


class LoRALinear(_Mergeable, nn.Linear):
    """A drop-in for a frozen `nn.Linear`: y = x Wᵀ + b + s · d(x) Aᵀ Bᵀ (Hu et al. 2021, LoRA).

    `weight` [N, K] and `bias` [N] keep their names and do not train; `lora_A` [R, K] and `lora_B` [N, R] do.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 16,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[LoRAOptions],
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._add_adapter(r, **options)

    @classmethod
    def from_linear(cls, linear: nn.Linear, r: int = 16, **options: Unpack[LoRAOptions]) -> Self:
        """The same layer with an adapter. It shares the linear's `weight` and `bias` Parameters and freezes them.

        Raises:
            TypeError: not an nn.Linear.
            ValueError: r is below 1 or lora_dropout is no probability below 1.
        """
        return _around_linear(cls, linear)._add_adapter(r, **options)

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, {self._options()}"


class LoRAConv1D(_Mergeable):
    """`LoRALinear` for the layer of GPT-2 that transformers calls Conv1D: its `weight` is [K, N], read in place, never copied."""

    def __init__(self, nf: int, nx: int, *, r: int = 16, **options: Unpack[LoRAOptions]) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(nf))
        self._add_adapter(r, **options)

    @classmethod
    def from_conv1d(cls, conv: nn.Module, r: int = 16, **options: Unpack[LoRAOptions]) -> Self:
        """The same layer with an adapter, sharing the Conv1D's `weight` [K, N] and `bias` [N] Parameters, which it freezes.

        Raises:
            TypeError: the layer has no weight [K, N] and bias [N].
            ValueError: r is below 1 or lora_dropout is no probability below 1.
        """
        weight: Any = getattr(conv, "weight", None)
        bias: Any = getattr(conv, "bias", None)
        fits = isinstance(weight, nn.Parameter) and isinstance(bias, nn.Parameter) and weight.dim() == 2
        if not fits or bias.shape != weight.shape[1:]:
            raise TypeError(f"conv: got {type(conv).__name__}, expected a Conv1D with weight [K, N] and bias [N]")
        return _around(cls, conv, nx=weight.shape[0], nf=weight.shape[1])._add_adapter(r, **options)

    def _weight_as_linear(self) -> Tensor:
        return self.weight.t()

    def extra_repr(self) -> str:
        return f"nf={self.nf}, nx={self.nx}, {self._options()}"


class MultiLoRALinear(nn.Linear):
    """A frozen linear layer with several adapters; each example or row of a batch has its own, or none. Trains and serves.

    Adapter i's parameters are `lora_A[name]` [R_i, K] and `lora_B[name]` [N, R_i]; adapters are numbered in the order they were added.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """What nn.Linear takes."""
        super().__init__(*args, **kwargs)
        self._begin()

    def _begin(self) -> Self:
        self.requires_grad_(False)
        self.lora_A = nn.ParameterDict()
        self.lora_B = nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        return self

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> Self:
        """The same layer without adapters yet. It shares the linear's `weight` and `bias` Parameters and freezes them.

        Raises:
            TypeError: not an nn.Linear.
        """
        return _around_linear(cls, linear)._begin()

    @property
    def adapters(self) -> list[str]:
        """The adapters' names in the order of their numbers."""
        return list(self.scaling)

    def add_adapter(
        self, name: str, r: int = 16, lora_alpha: float = 32, lora_dropout: float = 0.05, use_rslora: bool = False
    ) -> None:
        """Add an adapter that begins as no change (B is zero).

        Raises:
            ValueError: the name is taken, reserved or has a dot in it; r or lora_dropout is out of range.
        """
        if not name or name == BASE or "." in name or name in self.scaling:
            raise ValueError(f"name: got {name!r}, expected a new name without dots, other than {BASE!r}")
        new = _new_adapter(self.weight, r, lora_alpha, lora_dropout, use_rslora)
        self.lora_A[name], self.lora_B[name], self.scaling[name] = new
        self.lora_dropout[name] = lora_dropout

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter; those after it move down one number.

        Raises:
            ValueError: there is no adapter of that name.
        """
        if name not in self.scaling:
            raise ValueError(f"name: got {name!r}, expected one of {self.adapters}")
        for held in (self.lora_A, self.lora_B, self.scaling, self.lora_dropout):
            del held[name]

    def group(self, adapter_names: Iterable[str]) -> RowGroups:
        """The RowGroups of a batch whose examples have these adapters (PEFT's spelling: "__base__" for none); share it between layers.

        Raises:
            ValueError: a name is no adapter of this layer.
        """
        number = {BASE: -1, **{name: i for i, name in enumerate(self.adapters)}}
        names = list(adapter_names)
        for name in names:
            if name not in number:
                raise ValueError(f"adapter_names: got {name!r}, expected one of {self.adapters} or {BASE!r}")
        index = torch.tensor([number[name] for name in names], dtype=torch.int64, device=self.weight.device)
        return functional.group_rows(index, len(self.adapters))

    def forward(self, x: Tensor, adapters: Sequence[str] | Tensor | RowGroups | None = None) -> Tensor:
        """y [..., N] of x [..., K]. adapters: one name an example, or what `functional.multi_lora` takes as index; None: the base layer alone."""
        if adapters is None or not self.scaling:
            return super().forward(x)
        index = adapters if isinstance(adapters, (Tensor, RowGroups)) else self.group(adapters)
        return functional.multi_lora(
            x,
            self.weight,
            self.bias,
            [self.lora_A[name] for name in self.adapters],
            [self.lora_B[name] for name in self.adapters],
            list(self.scaling.values()),
            index,
            dropout_p=list(self.lora_dropout.values()),
            training=self.training,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, adapters={self.adapters}"


class SoftPrompt(nn.Module):
    """Trainable prompts in front of a batch (Lester et al. 2021): `prompt_embeddings` [S, P, D], one prompt for each row's task."""

    def __init__(
        self,
        num_virtual_tokens: int,
        token_dim: int,
        num_prompts: int = 1,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Begins uniform in ±0.5, as the paper's random initialisation."""
        super().__init__()
        _require_counts(num_virtual_tokens=num_virtual_tokens, token_dim=token_dim, num_prompts=num_prompts)
        rows = torch.empty(num_prompts, num_virtual_tokens, token_dim, device=device, dtype=dtype)
        self.prompt_embeddings = nn.Parameter(rows.uniform_(-0.5, 0.5))

    @classmethod
    def from_tokens(cls, embedding: Tensor, input_ids: Tensor) -> Self:
        """Prompts that begin as the embeddings [V, D] of given tokens: input_ids [P] or [S, P].

        Raises:
            ValueError: input_ids has no tokens or another shape.
            IndexError: a token is not in the embedding.
        """
        ids = input_ids if input_ids.dim() == 2 else input_ids[None]
        if ids.dim() != 2 or ids.numel() == 0:
            raise wrong("input_ids", input_ids, "shape [P] or [S, P] with at least one token")
        least, most, V = int(ids.min()), int(ids.max()), embedding.shape[0]
        if least < 0 or most >= V:
            raise IndexError(f"input_ids: expected numbers from 0 to {V - 1}, got {least} to {most}")
        prompt = cls(ids.shape[1], embedding.shape[1], ids.shape[0], device=embedding.device, dtype=embedding.dtype)
        prompt.prompt_embeddings.data.copy_(embedding.detach()[ids])
        return prompt

    @classmethod
    def from_vocabulary(
        cls, embedding: Tensor, num_virtual_tokens: int, num_prompts: int = 1, most_common: int = 5000
    ) -> Self:
        """Prompts that begin as embeddings drawn among the first `most_common` tokens (Lester et al. 2021, section 2.1.1)."""
        population = min(most_common, embedding.shape[0])
        ids = torch.randint(population, (num_prompts, num_virtual_tokens), device=embedding.device)
        return cls.from_tokens(embedding, ids)

    @classmethod
    def from_class_labels(
        cls,
        embedding: Tensor,
        labels: Sequence[Tensor | Sequence[int]],
        num_virtual_tokens: int,
        most_common: int = 5000,
    ) -> Self:
        """A prompt whose first rows begin as the classes' names (Lester et al. 2021, section 2.1.1), and the rest as `from_vocabulary`.

        labels: of each class the tokens of its name; a row is their mean. Of more classes than rows the first have one.

        Raises:
            ValueError: there is no class, or one without tokens.
            IndexError: a token is not in the embedding.
        """
        if len(labels) < 1:
            raise wrong("labels", list(labels), "at least one class")
        prompt = cls.from_vocabulary(embedding, num_virtual_tokens, most_common=most_common)
        for row, label in enumerate(labels[:num_virtual_tokens]):
            ids = torch.as_tensor(label, dtype=torch.long, device=embedding.device).reshape(-1)
            prompt.prompt_embeddings.data[0, row] = cls.from_tokens(embedding, ids).prompt_embeddings.data[0].mean(0)
        return prompt

    @torch.no_grad()
    def copy_to(self, model: nn.Module, adapter_name: str = "default") -> None:
        """Let PEFT's prompt tuning begin as this prompt, in a model whose files are then PEFT's. Where PEFT has twice the rows, both halves do.

        Raises:
            ValueError: the model has no such adapter with a table of prompt rows, or of another size.
        """
        encoders: Any = getattr(model, "prompt_encoder", {})
        encoder: Any = encoders[adapter_name] if adapter_name in encoders else None
        table: Any = getattr(encoder, "embedding", None)
        rows = self.prompt_embeddings[0]
        alone = encoder is not None and [*encoder.children()] == [table]  # P-tuning's goes through a network
        if len(self.prompt_embeddings) != 1 or not alone:
            raise ValueError(f"adapter_name: got {adapter_name!r}, expected a prompt of PEFT's for the one here")
        halves = table.weight.shape[0] // rows.shape[0]
        if table.weight.shape != (halves * rows.shape[0], rows.shape[1]) or halves not in (1, 2):
            raise wrong("model", table.weight, f"a prompt of shape {list(rows.shape)}, or with twice the rows")
        table.weight.copy_(rows.repeat(halves, 1))

    def forward(self, embeds: Tensor | None, attention_mask: Tensor, **options: Tensor | None) -> Prefixed:
        """`functional.prefix_concat` with this module's prompts; its options are that function's."""
        return functional.prefix_concat(self.prompt_embeddings, embeds, attention_mask, **options)

    def extra_repr(self) -> str:
        S, P, D = self.prompt_embeddings.shape
        return f"num_virtual_tokens={P}, token_dim={D}, num_prompts={S}"
