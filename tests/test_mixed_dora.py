"""DoRA adapters among the rows of a mixed batch, which PEFT refuses: each row as it were alone, forward and backward."""

import copy
from typing import Any

import pytest
import torch
from mixed_rows import BASE, all_at_once, assert_equal_rows, lora_and_dora, row_by_row
from peft_models import IDS, logits, q_proj, reason_of
from torch import nn

import fastlora
from fastlora.operators import dora_factor, lora_linear
from fastlora.peft import mixed, obstacles
from fastlora.peft.layers import SEEN

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
BATCHES = {
    "all kinds": ["small", BASE, "default", "dora", "small"],
    "DoRAs alone": ["dora", "small", "dora"],
    "one hot": ["dora"] * 4 + [BASE],
    "a DoRA and the base": [BASE, "small", BASE],
}


def ids_of(names: list[str], tokens: int = 11) -> torch.Tensor:
    return torch.randint(5, 90, (len(names), tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("tokens", [11, 1])
def test_results_and_gradients_are_those_of_each_row_alone(batch: str, tokens: int) -> None:
    names = BATCHES[batch]
    ids = ids_of(names, tokens)
    model = lora_and_dora().train()
    exact = row_by_row(copy.deepcopy(model).double(), names, ids)
    eager = row_by_row(copy.deepcopy(model), names, ids)
    fastlora.accelerate(model)
    ours = all_at_once(model, names, ids)
    assert q_proj(model).__dict__[SEEN].mixed
    assert_equal_rows(ours, eager, exact, sorted({*names} - {BASE}))
    assert any("lora_magnitude_vector.small" in name for name in ours) is ("small" in names)
    model.eval()
    expected = row_by_row(fastlora.restore(copy.deepcopy(model)), names, ids)["logits"]
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            for _ in range(2):  # the second finds the norms that were kept
                found = model(input_ids=ids, adapter_names=names).logits
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "adapters_float32", "autocast"),
    [(BFLOAT16, False, None), (BFLOAT16, True, None), (FLOAT32, True, BFLOAT16)],
    ids=["bfloat16", "float32-on-bfloat16", "autocast"],
)
def test_other_dtypes(dtype: torch.dtype, adapters_float32: bool, autocast: torch.dtype | None) -> None:
    names = BATCHES["all kinds"]
    ids = ids_of(names)
    model = lora_and_dora(dtype=dtype, autocast_adapter_dtype=adapters_float32).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(FLOAT32 if adapters_float32 else dtype)
    exact = row_by_row(copy.deepcopy(model).double(), names, ids)
    eager = row_by_row(copy.deepcopy(model), names, ids, autocast)
    fastlora.accelerate(model)
    assert_equal_rows(all_at_once(model, names, ids, autocast), eager, exact, ["default", "dora", "small"])
    assert q_proj(model).__dict__[SEEN].mixed and "PEFT" not in reason_of(model)[1]


def with_dropout(p: float) -> Any:
    """`small` drops, and no other."""
    model = lora_and_dora().train()
    for module in model.modules():
        if isinstance(module, nn.ModuleDict) and "small" in module and isinstance(module["small"], nn.Identity):
            module["small"] = nn.Dropout(p)
    return model


def test_dropout_of_a_row_is_what_it_would_be_alone() -> None:
    """From one seed: a layer draws the same mask for it, so its result and gradients are the same."""
    model = with_dropout(0.4)
    peer = copy.deepcopy(model)
    peer.set_adapter("small")
    fastlora.accelerate(model)
    x, layer, alone = torch.randn(3, 11, 32), q_proj(model), q_proj(peer)
    model.set_requires_grad(["small"])
    torch.manual_seed(5)
    y = layer(x, adapter_names=["default", "small", BASE])
    torch.manual_seed(5)
    expected = alone(x[1])
    torch.testing.assert_close(y[1], expected, rtol=1e-4, atol=1e-5)
    y[1].square().sum().backward()
    expected.square().sum().backward()
    for kind in ("lora_A", "lora_B", "lora_magnitude_vector"):
        ours, theirs = (getattr(one, kind)["small"].weight.grad for one in (layer, alone))
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), kind
    torch.testing.assert_close(y[2], alone.base_layer(x[2]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True], ids=["checkpointed", "reentrant"])
def test_checkpointing_draws_the_same_dropout_again(reentrant: bool) -> None:
    model = with_dropout(0.4)
    fastlora.accelerate(model)
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        torch.manual_seed(7)
        found.append(all_at_once(model, ["small", "dora", "default"]))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6)


def test_dropout_of_plain_rows_beside_a_dora_with_dropout() -> None:
    """At p = 1 nothing is left to chance: a plain row is the base's, and a DoRA's is W x + b."""
    model = lora_and_dora(lora_dropout=0.5).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 1.0
    fastlora.accelerate(model)
    names = ["default", "dora", BASE, "small"]
    ids = ids_of(names)
    with torch.no_grad():
        found = model(input_ids=ids, adapter_names=names).logits
        expected = model(input_ids=ids, adapter_names=[BASE] * 4).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert q_proj(model).__dict__[SEEN].dropout


def test_rows_that_one_adapter_spoils_are_its_own() -> None:
    model = lora_and_dora().eval()
    fastlora.accelerate(model)
    layer, x, names = q_proj(model), torch.randn(4, 3, 32), ["default", "dora", BASE, "small"]
    with torch.no_grad():
        before = layer(x, adapter_names=names)
        layer.lora_magnitude_vector["dora"].weight.fill_(torch.nan)
        after = layer(x, adapter_names=names)
    assert after[1].isnan().all() and torch.equal(after[[0, 2, 3]], before[[0, 2, 3]])


def test_what_is_kept_follows_the_adapters() -> None:
    model = lora_and_dora().eval()
    peer = copy.deepcopy(model)
    fastlora.accelerate(model)
    names = ["dora", "small", "default"]
    for each in (model, peer):
        if each is model:
            logits(model, adapter_names=names)
        with torch.no_grad():
            q_proj(each).lora_B["small"].weight.mul_(3)
            q_proj(each).lora_magnitude_vector["dora"].weight.mul_(2)
            q_proj(each).base_layer.weight.mul_(1.5)
    expected = row_by_row(peer, names)["logits"]
    torch.testing.assert_close(logits(model, adapter_names=names), expected, rtol=1e-4, atol=1e-5)


def test_norms_stay_when_the_names_of_a_batch_are_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another list of names is another plan, of the same adapters: only those are computed that no plan had, or whose W, A or B are others."""
    model = lora_and_dora().eval()
    peer = copy.deepcopy(model)
    fastlora.accelerate(model)
    seen, own = [], dora_factor.compute
    monkeypatch.setattr(dora_factor, "compute", lambda *given: seen.append(given) or own(*given))
    layers = sum("dora" in getattr(layer, "lora_magnitude_vector", ()) for layer in model.modules())

    def run(*names: str) -> int:
        before = len(seen)
        torch.testing.assert_close(
            logits(model, adapter_names=names), row_by_row(peer, names)["logits"].detach(), rtol=1e-4, atol=1e-5
        )
        return len(seen) - before

    assert run("dora", BASE, "default") == layers
    assert run("default", "dora", "dora") == run("dora", "dora", "dora") == run(BASE, BASE, BASE) == 0
    assert 0 < run("small", "dora", BASE) < layers, "those of the other alone"
    for each in (model, peer):
        linear = q_proj(each).lora_A["dora"]
        linear.weight = nn.Parameter(linear.weight.detach() * 3)
    assert run("dora", BASE, "default") == 1
    for each in (model, peer):
        q_proj(each).base_layer.weight = nn.Parameter(q_proj(each).base_layer.weight * 2, requires_grad=False)
    assert run("dora", BASE, "default") == 1 and run("default", "small", BASE) == 1
    assert obstacles.NORMS not in q_proj(copy.deepcopy(model)).__dict__
    model.delete_adapter("small")
    assert obstacles.NORMS not in q_proj(model).__dict__


def test_layers_that_share_x_are_computed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_and_dora().train()
    fastlora.accelerate(model)
    seen, own = [], lora_linear.compute
    monkeypatch.setattr(
        lora_linear, "compute", lambda x, weight, *rest: seen.append(len(weight)) or own(x, weight, *rest)
    )
    monkeypatch.setattr("fastlora.peft.siblings.Family._runs_mixed", staticmethod(lambda *_: True))
    names = ["dora", "default", BASE]
    found = all_at_once(model, names)
    assert sorted(seen) == [1, 1, 1, 1, 2, 2, 3, 3]
    seen.clear()
    expected = row_by_row(fastlora.restore(copy.deepcopy(model)), names)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    all_at_once(model, ["small", "default", BASE])  # a DoRA that query and value have, and key has not
    assert q_proj(model).__dict__[SEEN].mixed and sorted(seen) == [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2]


def test_what_stands_in_the_way_is_said() -> None:
    model = lora_and_dora().eval()
    fastlora.accelerate(model)
    names = ["default", "dora", BASE]
    handle = q_proj(model).lora_A["dora"].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="adapter_names: adapter 'dora' is a DoRA, and adapter 'dora' carries a hook"):
        logits(model, adapter_names=names)
    logits(model, adapter_names=["default"] * 3)
    handle.remove()
    model.merge_adapter(["default"])
    with pytest.raises(ValueError, match="adapter 'dora' is a DoRA, and the adapter is merged"):
        logits(model, adapter_names=names)
    assert mixed.under_way == 0


def test_encoder_and_decoder() -> None:
    model = lora_and_dora("t5").eval()
    peer = copy.deepcopy(model)
    fastlora.accelerate(model)
    names = ["dora", BASE, "small"]
    given: Any = {"input_ids": IDS, "decoder_input_ids": IDS[:, :6]}
    with torch.no_grad():
        found = model(**given, adapter_names=names).logits
        for row, name in enumerate(names):
            peer.set_adapter("default" if name == BASE else name)
            own = {key: value[row : row + 1] for key, value in given.items()}
            if name == BASE:
                with peer.disable_adapter():
                    expected = peer(**own).logits
            else:
                expected = peer(**own).logits
            torch.testing.assert_close(found[row : row + 1], expected, rtol=1e-4, atol=1e-5)
