"""fusion.py asks what is faster: each part by its tokens and elements; where it is the model's own forward, that runs, and the reason is told."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm

from fastlora import fusion, ops

CONFIG = LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
CONFIG._attn_implementation = "sdpa"
ANGLES = torch.ones(1, 5, 8), torch.zeros(1, 5, 8)
PARTS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], list[tuple[str, int, int]]]] = {
    "norm": (lambda: LlamaRMSNorm(32), (), [("rms_norm", 10, 320)]),
    "mlp": (lambda: LlamaMLP(CONFIG), (), [("swiglu", 10, 480)]),
    "attention": (lambda: LlamaAttention(CONFIG, 0), (ANGLES,), [("rotary", 10, 320), ("attention", 10, 320)]),
}
X = torch.linspace(-1, 1, 320).view(2, 5, 32)


def first(found: Any) -> Tensor:
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("forced", [None, "reference"])
def test_where_nothing_is_faster_the_models_own_forward_runs(
    part: str, forced: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not where plain PyTorch's operators are forced."""
    make, more, expected = PARTS[part]
    module = make().requires_grad_(False)
    own = first(module(X, *more))
    fusion.attach(nn.ModuleList([module]))
    asked: list[tuple[str, int, int]] = []

    def choose(op: str, like: Tensor, rows: int, elements: int, dropout: bool) -> ops.Choice:
        assert like.dtype == X.dtype and not dropout
        asked.append((op, rows, elements))
        return ops.Choice("reference", "it is slower")

    monkeypatch.setattr(ops, "forced", forced)
    monkeypatch.setattr(ops, "choose", choose)
    torch.testing.assert_close(first(module(X, *more)), own)
    assert list(dict.fromkeys(asked)) == expected
    assert module.__dict__[fusion.SEEN].obstacle == (None if forced else "it is slower")


def test_without_columns_each_is_asked_as_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(
        ops, "choose", lambda op, like, rows, *_, **__: asked.append(rows) or ops.Choice("cpu", "it is faster")
    )
    assert fusion._obstacle("swiglu", 0, torch.ones(3, 0)) is None
    assert fusion._obstacle("swiglu", 1, torch.ones(3, 1)) is None
    assert asked == [0, 3]


def test_rows_without_padding_are_attended_to_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else can."""
    q, starts = torch.linspace(-1, 1, 288).view(1, 4, 9, 8), torch.tensor([0, 4, 9])
    expected = fusion.attend(nn.Module(), q, q, q, None, cu_seq_lens_q=starts)[0]
    monkeypatch.setattr(ops, "choose", lambda *_, **__: ops.Choice("reference", "it is slower"))
    torch.testing.assert_close(fusion.attend(nn.Module(), q, q, q, None, cu_seq_lens_q=starts)[0], expected)
