"""Attention of a model's rows behind what they share: `segment_parents` among a forward's keywords (fusion.attend)."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention

from fastlora import fusion


class Causal(nn.Module):
    is_causal = True
    num_key_value_groups = 2


def test_rows_behind_a_shared_prefix() -> None:
    """Of tokens, or of keys alone, as a cache has them."""
    q, k = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8)
    nan, parents = torch.full((1, 1, 1, 1), torch.nan), torch.tensor([-1, 0, 0], dtype=torch.int32)
    starts, keys, own = (torch.tensor(one, dtype=torch.int32) for one in ([0, 4, 6, 9], [0, 4, 6, 9], [0, 0, 2, 5]))
    found, _ = fusion.attend(
        Causal(), q, k, -k, nan, cu_seq_lens_q=starts, cu_seq_lens_k=keys, max_length_q=5, segment_parents=parents
    )
    behind, _ = fusion.attend(
        Causal(), q[:, :, 4:], k, -k, nan, cu_seq_lens_q=own, cu_seq_lens_k=keys, segment_parents=parents
    )
    assert torch.equal(behind, found[:, 4:])
    for place in ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 6, 7, 8]):
        rows = (one[:, :, place] for one in (q, k, -k))
        torch.testing.assert_close(found[:, place], sdpa_attention_forward(Causal(), *rows, None)[0])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("segment_parents", {"segment_parents": torch.tensor([-1, 0])}),
        ("segment_parents", {"segment_parents": torch.tensor([-1, 1]), "cu_seq_lens_q": torch.tensor([0, 2, 10])}),
        ("starts", {"segment_parents": torch.tensor([-1, 0]), "cu_seq_lens_q": torch.tensor([0, 2, 9])}),
    ],
)
def test_wrong_prefixes(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: .*expected"):
        fusion.attend(Causal(), torch.ones(1, 4, 10, 8), *torch.ones(2, 1, 2, 10, 8), None, **options)


def test_who_compiles_is_told() -> None:
    """What torch traces is the model's own attention, which knows of no parents and would leave them out in silence."""
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
    attention = nn.ModuleDict({"attention": LlamaAttention(config, 0)})
    fusion.attach(attention)
    given = torch.randn(1, 5, 32), (torch.ones(1, 5, 8), torch.zeros(1, 5, 8)), None
    starts, parents = torch.tensor([0, 2, 5]), torch.tensor([-1, 0])
    with pytest.raises(Exception, match="segment_parents: got .*expected"):
        torch.compile(attention["attention"], backend="eager", fullgraph=True)(
            *given, cu_seq_lens_q=starts, segment_parents=parents
        )
