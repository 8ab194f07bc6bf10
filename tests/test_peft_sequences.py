"""Random sequences of what people do to a PEFT model: accelerated or not, it computes the same and learns the same after each."""

import copy
import functools
import random
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import fastlora

WIDTH, SEQUENCES, LENGTH = 8, 100, 8
CLOSE, CLOSE_16 = 1e-4, 0.06  # of the largest number; the second where bfloat16 has a part in it


class Block(nn.Module):
    """Attention's projections and a gated MLP's, without what lies between."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12)
        self.down_proj, self.head = nn.Linear(12, WIDTH), nn.Linear(WIDTH, 5)
        self.way = ""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        q = self.q_proj(x)
        if self.way == "x written to" and not torch.is_grad_enabled():
            x.mul_(0.5)
        elif self.way == "x copied":
            x = x.clone()
        with torch.autocast("cpu", torch.bfloat16) if self.way == "autocast for k" else nullcontext():
            k = self.k_proj(x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.way != "no gradient of v"):
            v = self.v_proj(x)
        x = x + self.o_proj(torch.tanh(q * k) + v)
        return self.head(x + self.down_proj(torch.tanh(self.gate_proj(x)) * self.up_proj(x)))


@functools.cache
def template() -> Any:
    """PEFT takes longer to make a model than a sequence lasts."""
    torch.manual_seed(0)
    block = Block()
    targets = [name for name, _ in block.named_children() if name != "head"]
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(block), config)
    other = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False)
    model.add_adapter("other", other)
    return model


class Pair:
    """A model that is accelerated, and its twin that is not."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.plain: Any = copy.deepcopy(template())
        self.ours: Any = fastlora.accelerate(copy.deepcopy(self.plain), frozen=draw.random() < 0.5)
        self.handles: list[Any] = []
        self.close = CLOSE

    def both(self, do: Callable[[Any, Any, torch.Generator], Any]) -> list[Any]:
        """Do it to both: given the model, its block and a generator in one and the same state."""
        seed = self.draw.randrange(10**6)
        done = []
        for model in (self.plain, self.ours):
            torch.manual_seed(seed)
            try:
                done.append(do(model, model.base_model.model[0], torch.Generator().manual_seed(seed)))
            except RuntimeError as error:  # torch forbids it
                done.append(error)
        if any(isinstance(result, RuntimeError) for result in done):
            assert all(isinstance(result, RuntimeError) for result in done), done
            return [[], []]
        return done

    def layer_of(self, block: Any) -> Any:
        """One of the layers with an adapter, the same in both."""
        return getattr(block, self.chosen)

    def choose_layer(self) -> None:
        self.chosen = self.draw.choice(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"])

    def assert_equal(self, found: list[list[Tensor | None]]) -> None:
        for plain, ours in zip(*found, strict=True):
            assert (plain is None) == (ours is None)
            if plain is not None and ours is not None:
                assert plain.dtype == ours.dtype and plain.shape == ours.shape
                error = (plain.double() - ours.double()).abs().max()
                assert error <= self.close * max(1.0, plain.double().abs().max().item()), error


def dtype_of(model: Any) -> torch.dtype:
    return model.base_model.model[0].head.weight.dtype


def draw_x(model: Any, generator: torch.Generator) -> Tensor:
    return torch.randn(3, 2, WIDTH, generator=generator, dtype=torch.float64).to(dtype_of(model))


def forward(pair: Pair) -> None:
    kind = pair.draw.choice(["no_grad", "inference", "names", "disabled"])

    def run(model: Any, _: Any, generator: torch.Generator) -> list[Tensor]:
        x = draw_x(model, generator)
        mode = torch.inference_mode() if kind == "inference" else torch.no_grad()
        with mode, model.disable_adapter() if kind == "disabled" else nullcontext():
            merged = any(getattr(module, "merged", False) for module in model.modules())
            names = {"adapter_names": ["default", "__base__", "other"]} if kind == "names" and not merged else {}
            return [(model.eval() if names else model.train())(x, **names).clone()]

    pair.assert_equal(pair.both(run))


def step(pair: Pair) -> None:
    twice, fused = pair.draw.random() < 0.3, pair.draw.random() < 0.5

    def run(model: Any, _: Any, generator: torch.Generator) -> list[Tensor | None]:
        x = draw_x(model, generator).requires_grad_()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        model.zero_grad()
        y = model.train()(x)
        loss = y.square().mean()
        if twice:
            loss.backward(retain_graph=True)
        loss.backward()
        results = [y.detach(), x.grad, *(parameter.grad for parameter in trained.values())]
        results = [None if one is None else one.clone() for one in results]
        nn.utils.clip_grad_norm_(trained.values(), 0.2)  # what diverges makes the smallest difference large
        torch.optim.SGD(trained.values(), lr=1.0, fused=fused).step()
        return results

    if any(parameter.requires_grad for parameter in pair.plain.parameters()):
        pair.assert_equal(pair.both(run))


def set_adapters(pair: Pair) -> None:
    names = pair.draw.choice([["default"], ["other"], ["default", "other"]])
    pair.both(lambda model, *_: model.base_model.set_adapter(names))


def merge(pair: Pair) -> None:
    safely = pair.draw.random() < 0.5
    pair.both(lambda model, *_: model.merge_adapter(safe_merge=safely))


def unmerge(pair: Pair) -> None:
    pair.both(lambda model, *_: model.unmerge_adapter())


def hook(pair: Pair) -> None:
    where = pair.draw.choice(["base", "lora_A", "dropout", "layer", "before the layer", "everywhere"])

    def run(_: Any, block: Any, __: Any) -> Any:
        layer = pair.layer_of(block)
        if where == "before the layer":
            return layer.register_forward_pre_hook(lambda module, args: (args[0] * 0.5, *args[1:]))
        parts = {"base": layer.base_layer, "layer": layer}
        parts |= {"lora_A": layer.lora_A["default"], "dropout": layer.lora_dropout["default"]}
        return parts[where].register_forward_hook(lambda module, args, y: y * 0.5)

    if where == "everywhere":
        sees = nn.modules.module.register_module_forward_hook
        pair.handles.append(sees(lambda module, args, y: y * 0.5 if isinstance(module, nn.Linear) else None))
    else:
        pair.handles += pair.both(run)


def unhook(pair: Pair) -> None:
    for handle in pair.handles:
        handle.remove()
    pair.handles.clear()


def replace_weight(pair: Pair) -> None:
    def run(model: Any, block: Any, generator: torch.Generator) -> None:
        base = pair.layer_of(block).base_layer
        value = torch.randn(base.weight.shape, generator=generator, dtype=torch.float64).to(base.weight.dtype) / 2
        base.weight = nn.Parameter(value, requires_grad=base.weight.requires_grad)

    pair.both(run)


def write_weight(pair: Pair) -> None:
    how = pair.draw.choice(["data", "in place", "numpy"])
    where = pair.draw.choice(["base", "lora_B", "head"])

    def run(_: Any, block: Any, __: Any) -> None:
        layer = pair.layer_of(block)
        parts = {"base": layer.base_layer, "lora_B": layer.lora_B["default"], "head": block.head}
        weight = parts[where].weight
        if how == "numpy" and weight.dtype != torch.bfloat16:
            weight.detach().numpy()[:] *= 0.7
            return
        with torch.no_grad():
            (weight if how == "in place" else weight.data).mul_(0.7)

    pair.both(run)


def unfreeze(pair: Pair) -> None:
    def run(_: Any, block: Any, __: Any) -> None:
        for module in (pair.layer_of(block).base_layer, block.head):
            module.requires_grad_(not module.weight.requires_grad)

    pair.both(run)


def convert(pair: Pair) -> None:
    dtype = pair.draw.choice([torch.float64, torch.float32])
    pair.both(lambda model, *_: model.to(dtype))


def convert_adapter(pair: Pair) -> None:
    dtype = pair.draw.choice([torch.bfloat16, torch.float32])
    pair.close = CLOSE_16

    def run(model: Any, block: Any, _: Any) -> None:
        for part in (pair.layer_of(block).lora_A, pair.layer_of(block).lora_B):
            part.to(dtype)

    pair.both(run)


def change_way(pair: Pair) -> None:
    way = pair.draw.choice(["", "x written to", "x copied", "autocast for k", "no gradient of v"])
    pair.close = CLOSE_16 if way == "autocast for k" else pair.close
    pair.both(lambda _, block, __: setattr(block, "way", way))


def duplicate(pair: Pair) -> None:
    unhook(pair)  # their handles would not reach the copies
    pair.plain, pair.ours = copy.deepcopy(pair.plain), copy.deepcopy(pair.ours)


def duplicate_layer(pair: Pair) -> None:
    way = pair.draw.choice([copy.copy, copy.deepcopy])
    unhook(pair)
    pair.both(lambda _, block, __: setattr(block, pair.chosen, way(pair.layer_of(block))))


def add_and_delete(pair: Pair) -> None:
    config = peft.LoraConfig(r=1, target_modules=["k_proj", "down_proj"], init_lora_weights=False)

    def run(model: Any, *_: Any) -> None:
        if "third" in model.peft_config:
            model.delete_adapter("third")
        else:
            model.add_adapter("third", config)

    pair.both(run)


def accelerate_again(pair: Pair) -> None:
    fastlora.accelerate(pair.ours, frozen=pair.draw.random() < 0.5)


def restore(pair: Pair) -> None:
    fastlora.restore(pair.ours)


def report(pair: Pair) -> None:
    assert len(fastlora.report(pair.ours)) >= 7


OPERATIONS = [
    *(forward, step) * 4,
    *(set_adapters, merge, unmerge, hook, unhook, replace_weight, write_weight, unfreeze, convert, convert_adapter),
    *(change_way, change_way, duplicate, duplicate_layer, add_and_delete, accelerate_again, restore, report),
]


@pytest.mark.filterwarnings("ignore")  # PEFT's, of merged adapters and the like
def test_random_sequences() -> None:
    run_sequences(range(SEQUENCES))


@pytest.mark.filterwarnings("ignore")
def test_random_sequences_with_packed_copies(copies: list[int]) -> None:
    run_sequences(range(SEQUENCES, 2 * SEQUENCES))
    assert sum(map(bool, copies)) > 10 * SEQUENCES


def run_sequences(seeds: range) -> None:
    for seed in seeds:
        draw = random.Random(seed)
        pair = Pair(draw)
        done = []
        try:
            for operation in [*draw.choices(OPERATIONS, k=LENGTH), forward, step]:
                pair.choose_layer()
                done.append(operation.__name__)
                operation(pair)
        except Exception as error:
            raise AssertionError(f"sequence {seed}: {', '.join(done)}") from error
        finally:
            unhook(pair)
