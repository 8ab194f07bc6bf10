"""Several adapters trained on one batch: each one's gradients are as near to the exact ones as PEFT's are that has the batch's rows of it alone."""

import copy
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import lora
from peft_models import assert_as_near_as
from torch import nn
from training import one_thread  # noqa: F401  (a fixture)

import fastlora
from fastlora import operators, reference
from fastlora.language_model_loss import IGNORE, LanguageModelLoss
from fastlora.peft import mixed
from fastlora.peft.layers import Fused

RANKS = {"one": 1, "two": 6, "three": 17}
OF = ["two", "one", "three", "two", "two", "one"]  # each example's
LENGTHS = [9, 4, 7, 9, 2, 5]


def adapted(p: tuple[float, ...] = (0.0, 0.0, 0.0), everywhere: bool = False) -> Any:
    """A Llama with adapters of ragged ranks, in training; not all layers have all of them unless `everywhere`."""
    model: Any = None
    for (name, r), drop in zip(RANKS.items(), p, strict=True):
        targets = "all-linear" if everywhere or name == "two" else ["q_proj", "v_proj", "down_proj"]
        config = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=drop, target_modules=targets, init_lora_weights=False)
        if model is None:
            model = get_peft_model(tiny.llama(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model.train()


def batch(lengths: list[int]) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 40, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(2))
    real = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    labels = ids.masked_fill(~real, IGNORE)
    labels[:, 1::3] = IGNORE
    return {"input_ids": ids.masked_fill(~real, 0), "attention_mask": real.long(), "labels": labels}


def labelled(given: dict[str, torch.Tensor], name: str) -> int:
    mine = torch.tensor([other == name for other in OF])
    return int((given["labels"][mine, 1:] != IGNORE).sum())


def gradients(model: Any, name: str) -> dict[str, torch.Tensor]:
    return {key: p.grad for key, p in model.named_parameters() if f".{name}." in key and p.grad is not None}


def alone(model: Any, given: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """By PEFT and transformers: the adapter's loss on its own rows, and its gradients."""
    model.set_adapter(name)
    model.zero_grad()
    mine = torch.tensor([other == name for other in OF])
    logits = model(**{key: value[mine] for key, value in given.items() if key != "labels"}, use_cache=False).logits
    targets = given["labels"][mine, 1:]
    loss = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, ignore_index=IGNORE)
    loss.backward()
    return {"logits": loss.detach()[None], **gradients(model, name)}


def together(model: Any, given: dict[str, torch.Tensor], lengths: list[int]) -> dict[str, dict[str, torch.Tensor]]:
    """Of each adapter the same, by one backward."""
    loss = LanguageModelLoss(model)
    model.set_adapter("one")
    loss.choose(given)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    counted = (given["labels"][:, 1:] != IGNORE).sum(1).tolist()
    owner = [name for name, count in zip(OF, counted, strict=True) for _ in range(count)]
    weights = torch.tensor([1 / labelled(given, name) for name in owner])
    with mixed.training(model.base_model, Fused, mixed.RowNames(OF, lengths)):
        losses = loss.by_token(given) * weights
        losses.sum().backward()
    return {
        name: {
            "logits": losses.detach()[torch.tensor([one == name for one in owner])].sum()[None],
            **gradients(model, name),
        }
        for name in RANKS
    }


@pytest.mark.parametrize("fuse", [True, False], ids=["without padding", "padded"])
def test_each_adapter_has_its_own_gradients(fuse):
    model, given = adapted(), batch(LENGTHS)
    exact, eager = copy.deepcopy(model).double(), copy.deepcopy(model)
    fastlora.accelerate(model, frozen=True, fuse=fuse)
    found = together(model, given, LENGTHS)
    for name in RANKS:
        assert len(found[name]) == 1 + 2 * (14 if name == "two" else 6)
        assert_as_near_as(found[name], alone(eager, given, name), alone(exact, given, name))


def test_gradient_checkpointing_knows_the_rows_again():
    model, given = adapted(), batch(LENGTHS)
    fastlora.accelerate(model, frozen=True, fuse=True)
    plain = together(model, given, LENGTHS)
    plain = {name: {key: value.clone() for key, value in its.items()} for name, its in plain.items()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = together(model, given, LENGTHS)
    assert all(torch.equal(value, again[name][key]) for name, its in plain.items() for key, value in its.items())


def test_given_the_same_masks_dropout_is_as_alone(monkeypatch):
    """An adapter drops by its own probability: its rows' part of the layer's mask, in the place of PEFT's nn.Dropout, gives PEFT its gradients."""
    lengths = [6] * len(OF)
    model, given = adapted(p=(0.4, 0.0, 0.15), everywhere=True), batch(lengths)
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    fastlora.accelerate(model, frozen=True, fuse=True)
    seeds: list[torch.Tensor] = []
    own = operators.lora_linear.run

    def remember(*args: Any) -> Any:
        seeds.extend([] if args[7] is None else args[7])
        return own(*args)

    monkeypatch.setattr(operators.lora_linear, "run", remember)
    found = together(model, given, lengths)
    assert len(seeds) == len({int(seed) for seed in seeds}) == 14  # each layer its own
    for name in RANKS:
        rows = torch.cat([torch.arange(6) + 6 * i for i, other in enumerate(OF) if other == name])
        results = []
        for peer in (eager, exact):
            left = list(seeds)
            dropouts = {
                module.lora_dropout[name]: None
                for module in peer.modules()
                if isinstance(module, lora.Linear) and isinstance(module.lora_dropout[name], nn.Dropout)
            }

            def with_our_mask(
                self: nn.Module, x: torch.Tensor, left: Any = left, dropouts: Any = dropouts, rows: Any = rows
            ) -> torch.Tensor:
                if self not in dropouts:
                    return x
                flat = x.reshape(-1, x.shape[-1])
                keep = reference.draw_keep(x.new_empty(36, x.shape[-1]), self.p, left.pop(0), rows)
                return reference.dropout(flat, self.p, keep).view_as(x)

            monkeypatch.setattr(nn.Dropout, "forward", with_our_mask)
            results.append(alone(peer, given, name))
        assert_as_near_as(found[name], *results)
