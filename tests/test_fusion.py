"""`accelerate(model, fuse=True)`: a model's own values from fused norms, gated MLPs, rotary embeddings and attention; everything else as it was."""

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bounds import Compared, assert_within_bound_over_inputs
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import fastlora
from fastlora import fusion, ops
from fastlora.operators import attention

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
NORM, MLP, ATTENTION = "RMSNorm", "MLP", "Attention"
MODELS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), {NORM, MLP, ATTENTION}),
    "llama with biases": (
        lambda: LlamaForCausalLM(LlamaConfig(**SIZES, mlp_bias=True, attention_bias=True)),
        {NORM, MLP, ATTENTION},
    ),
    "qwen2": (lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)), {NORM, MLP, ATTENTION}),
    "qwen3": (lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)), {NORM, MLP, ATTENTION}),
    "mistral": (lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)), {NORM, MLP, ATTENTION}),
    "mixtral": (
        lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, experts_implementation="eager")),
        {NORM, ATTENTION},
    ),
    "phi3, gate and up in one": (lambda: Phi3ForCausalLM(Phi3Config(**SIZES)), {NORM, ATTENTION}),
    "gemma2, whose norm adds one": (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8)), {ATTENTION}),
    "gelu": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES, hidden_act="gelu")), {NORM, ATTENTION}),
}
LENGTHS = (12, 7, 9)


def build(name: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = MODELS[name][0]().to(dtype)
    with torch.no_grad():
        for module in model.modules():
            if type(module).__name__.endswith(NORM):
                module.weight.normal_(1, 0.1)
    return model.train()


def adapted(name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A frozen model with a random adapter, in training."""
    options = {"target_modules": "all-linear", "init_lora_weights": False, "r": 3, "lora_alpha": 1, **options}
    return get_peft_model(build(name, dtype), LoraConfig(**options), autocast_adapter_dtype=False).train()


def batch(padding: str = "right", seed: int = 3) -> dict[str, Tensor]:
    """Rows of LENGTHS, padded on one side, or of one length; half of each without labels."""
    T = max(LENGTHS)
    ids = torch.randint(3, 96, (len(LENGTHS), T), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()
    if padding == "left":
        mask = mask.flip(1)
    if padding == "none":
        mask = torch.ones_like(mask)
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :6] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def swapped(model: nn.Module) -> set[str]:
    """The endings of the names of the classes that were swapped."""
    derived = [type(module).__name__ for module in model.modules() if fusion.is_derived(module)]
    return {ending for ending in fusion.PARTS if any(name.endswith(ending) for name in derived)}


def trained_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    parameters = {name: one for name, one in model.named_parameters() if one.requires_grad}
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def told(model: nn.Module) -> dict[str, tuple[str, str]]:
    """What `report` says of the parts."""
    return {name.split(" x ")[1]: rest for name, *rest in fastlora.report(model) if " x " in name}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_fused(name: str) -> None:
    model = fastlora.accelerate(build(name).requires_grad_(False), fuse=True)
    assert swapped(model) == MODELS[name][1]
    assert bool(told(model)) == bool(MODELS[name][1])


def exact_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """In the logits' dtype: transformers itself computes it in float32."""
    return F.cross_entropy(logits.flatten(0, 1), F.pad(labels[:, 1:], (0, 1), value=-100).flatten())


@pytest.mark.parametrize("padding", ["right", "left", "none"])
@pytest.mark.parametrize("loss", [False, True], ids=["", "loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_values_are_as_near_as_the_models_own(name: str, dtype: torch.dtype, loss: bool, padding: str) -> None:
    if name == "mixtral" and dtype is torch.bfloat16:
        pytest.skip("a rounding sends a token to another expert")
    if name.startswith("gemma2") and padding == "left":
        pytest.skip("its own values are NaN")
    plain, exact = adapted(name, dtype), adapted(name, torch.float64)
    exact.load_state_dict(plain.state_dict())
    ours = fastlora.accelerate(copy.deepcopy(plain), loss=loss, fuse=True)
    seeds = itertools.count()

    def compute() -> dict[str, Compared]:
        given = batch(padding, next(seeds))
        real = given["attention_mask"] != 0
        runs = [model(**given) for model in (ours, plain, exact)]
        losses = [run.loss for run in runs[:2]] + [exact_loss(runs[2].logits, given["labels"])]
        found = {"loss": [one.detach() for one in losses]}
        if not loss:
            found["logits"] = [run.logits.detach()[real] for run in runs]
        grads = [trained_gradients(model, one) for model, one in zip((ours, plain, exact), losses, strict=True)]
        found["gradients"] = [torch.cat([one.flatten() for one in of_one.values()]) for of_one in grads]
        return found

    assert_within_bound_over_inputs(compute)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_with_the_loss_a_batch_runs_without_its_padding(padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[list[int]] = []
    own = attention.run

    def run(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, *rest: Any) -> Any:
        rows.append(starts.diff().tolist())
        return own(q, k, v, starts, *rest)

    plain, ours = adapted(), fastlora.accelerate(adapted(), loss=True, fuse=True)
    ours(**batch(padding))
    monkeypatch.setattr(attention, "run", run)
    found, expected = ours(**batch(padding)).loss, plain(**batch(padding)).loss
    assert rows == [list(LENGTHS)] * SIZES["num_hidden_layers"]
    torch.testing.assert_close(found, expected)


def test_a_model_that_is_given_positions() -> None:
    given = {**batch(), "position_ids": torch.arange(12).expand(3, 12) * 2 + 1}
    plain, ours = adapted(), fastlora.accelerate(adapted(), loss=True, fuse=True)
    for _ in range(2):
        torch.testing.assert_close(ours(**given).loss, plain(**given).loss)


def test_a_label_on_padding_counts() -> None:
    given = batch()
    given["labels"][1, 10] = 5
    plain, ours = adapted(), fastlora.accelerate(adapted(), loss=True, fuse=True)
    torch.testing.assert_close(ours(**given).loss, plain(**given).loss)


def test_rows_that_know_of_one_another_keep_their_padding() -> None:
    """A model that mixes tokens elsewhere than in its attention: each token's input has a part of the token before."""

    def shifted(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output + 0.1 * torch.cat((torch.zeros_like(output[:, :1]), output[:, :-1]), 1)

    models = adapted(), adapted()
    for model in models:
        model.get_base_model().model.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs: ((shifted(module, (), args[0]), *args[1:]), kwargs), with_kwargs=True
        )
    plain, ours = models[0], fastlora.accelerate(models[1], loss=True, fuse=True)
    torch.testing.assert_close(ours(**batch()).loss, plain(**batch()).loss)


def test_generation_and_evaluation_are_the_models_own() -> None:
    plain, ours = adapted().eval(), fastlora.accelerate(adapted(), loss=True, fuse=True).eval()
    given = {name: value[:, :7] for name, value in batch("left").items() if name != "labels"}
    tokens = [model.generate(**given, max_new_tokens=6, do_sample=False) for model in (ours, plain)]
    assert torch.equal(*tokens)
    for options in ({"output_hidden_states": True}, {"use_cache": False}):
        with torch.no_grad():
            found, expected = (model(**batch(), **options) for model in (ours, plain))
        torch.testing.assert_close(found.logits, expected.logits)
        for one, other in zip(found.hidden_states or (), expected.hidden_states or (), strict=True):
            torch.testing.assert_close(one, other)


def test_gradient_checkpointing() -> None:
    ours, other = (fastlora.accelerate(adapted(), loss=True, fuse=True) for _ in range(2))
    other.gradient_checkpointing_enable({"use_reentrant": False})
    other.enable_input_require_grads()
    grads = [trained_gradients(model, model(**batch()).loss) for model in (ours, other)]
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value)


@pytest.mark.parametrize("way", ["eager", "sdpa"])
def test_other_attentions_stay(way: str) -> None:
    """Attention that transformers itself computes, whose weights may be asked for, is not torch's."""
    plain, ours = adapted().eval(), fastlora.accelerate(adapted(), fuse=True).eval()
    for model in (plain, ours):
        model.set_attn_implementation(way)
    options = {"output_attentions": True} if way == "eager" else {}
    found, expected = (model(**batch("none"), **options) for model in (ours, plain))
    torch.testing.assert_close(found.logits, expected.logits)
    for one, other in zip(found.attentions or (), expected.attentions or (), strict=True):
        torch.testing.assert_close(one, other)


def test_what_no_operator_covers_runs_the_models_own_forward() -> None:
    plain = adapted()
    ours = fastlora.accelerate(copy.deepcopy(plain), fuse=True)
    for model in (plain, ours):
        for module in model.modules():
            if type(module).__name__.endswith(NORM):
                module.weight.requires_grad_()
    runs = [model(**batch()) for model in (ours, plain)]
    torch.testing.assert_close(runs[0].logits, runs[1].logits)
    grads = [trained_gradients(model, run.loss) for model, run in zip((ours, plain), runs, strict=True)]
    assert grads[0].keys() == grads[1].keys()
    assert told(ours)["LlamaRMSNorm"] == ["transformers", "its own forward: its weight is trained"]
    assert told(ours)["LlamaAttention"] == ["transformers", "its own forward: there is a mask"]
    assert told(ours)["LlamaMLP"][1].startswith("swiglu, 36 rows: ")


def test_dropout_in_attention_is_torchs() -> None:
    ours = fastlora.accelerate(adapted(), fuse=True)
    for module in ours.modules():
        if type(module).__name__.endswith(ATTENTION):
            module.attention_dropout = 0.5
    ours(**batch("none"))
    assert told(ours)["LlamaAttention"] == ["transformers", "its own forward: attention has dropout"]


def test_dropout_in_attention_keeps_padding() -> None:
    """Though it was left out before."""
    ours = fastlora.accelerate(adapted(), loss=True, fuse=True)
    ours(**batch())
    for module in ours.modules():
        if type(module).__name__.endswith(ATTENTION):
            module.attention_dropout = 0.5
    ours(**batch())
    assert told(ours)["LlamaAttention"] == ["transformers", "its own forward: attention has dropout"]
    assert told(ours)["LlamaMLP"][1].startswith("swiglu, 36 rows: ")


def test_under_autocast() -> None:
    plain, ours = adapted(), fastlora.accelerate(adapted(), fuse=True)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (model(**batch("none")) for model in (ours, plain))
    assert found.logits.dtype == expected.logits.dtype
    torch.testing.assert_close(found.loss, expected.loss, rtol=0.02, atol=0.02)


def test_inside_transforms_and_compilers() -> None:
    plain, ours = build().requires_grad_(False), fastlora.accelerate(build().requires_grad_(False), fuse=True)
    norm = plain.model.norm
    x = torch.randn(3, 5, 32)
    assert torch.equal(torch.func.vmap(ours.model.norm)(x), torch.func.vmap(norm)(x))
    torch.compiler.reset()
    compiled = torch.compile(ours, backend="eager", fullgraph=False)
    torch.testing.assert_close(compiled(batch("none")["input_ids"]).logits, plain(batch("none")["input_ids"]).logits)
    torch.compiler.reset()


def test_compiled_layers_keep_their_padding() -> None:
    """Be they compiled before or after it was left out: what torch traces is the model's own attention, which needs the mask."""
    torch.compiler.reset()
    plain, ours = adapted(), fastlora.accelerate(adapted(), loss=True, fuse=True)
    ours(**batch())
    for layer in ours.get_base_model().model.layers:
        layer.compile(backend="aot_eager", dynamic=True)
    for seed in range(3):
        found, expected = (model(**batch("right", seed)).loss for model in (ours, plain))
        torch.testing.assert_close(found, expected)
        for one, other in zip(
            *(trained_gradients(model, loss).values() for model, loss in ((ours, found), (plain, expected))),
            strict=True,
        ):
            torch.testing.assert_close(one, other)
    torch.compiler.reset()


def test_copies_pickles_and_files_are_the_models_own(tmp_path: Any) -> None:
    ours = fastlora.accelerate(build().requires_grad_(False), loss=True, fuse=True)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert swapped(other) == {NORM, MLP, ATTENTION}
        torch.testing.assert_close(other(**batch()).loss, ours(**batch()).loss)
    ours.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, PreTrainedModel) and not swapped(loaded)
    torch.testing.assert_close(loaded.train()(**batch()).loss, build()(**batch()).loss)


def test_restore() -> None:
    plain = adapted()
    classes = [type(module) for module in plain.modules()]
    ours = fastlora.accelerate(copy.deepcopy(plain), loss=True, fuse=True)
    for _ in range(2):
        fastlora.accelerate(ours, loss=True, fuse=True)  # again changes nothing
    ours(**batch())
    fastlora.restore(ours)
    assert [type(module) for module in ours.modules()] == classes and not told(ours)
    assert all(
        module.__dict__.keys() == other.__dict__.keys()
        for module, other in zip(ours.modules(), plain.modules(), strict=True)
    )
    assert torch.equal(ours(**batch()).loss, plain(**batch()).loss)


def test_a_model_without_such_parts() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=96, n_positions=16))
    expected = model.eval()(**batch()).loss
    assert not swapped(fastlora.accelerate(model, fuse=True))
    assert torch.equal(model(**batch()).loss, expected)


def test_where_the_models_own_is_as_fast_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card, for which there are no such kernels; without padding torch's attention takes the rows one by one."""
    monkeypatch.setattr(ops, "candidates", lambda *_: [])
    monkeypatch.setattr(ops, "obstacle_of", lambda *_: "it is slower")
    plain, ours = adapted(), fastlora.accelerate(adapted(), loss=True, fuse=True)
    torch.testing.assert_close(ours(**batch()).loss, plain(**batch()).loss)
    ours.eval()(**batch("none"))
    for name in ("LlamaRMSNorm", "LlamaMLP", "LlamaAttention"):
        assert told(ours)[name] == ["transformers", "its own forward: plain PyTorch, since it is slower"]
