"""LanguageModelLoss: every path of a model's loss against transformers' own."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from test_linear_cross_entropy import LargestResult, in_blocks  # noqa: F401  (a fixture)
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import fastlora
from fastlora import language_model_loss
from fastlora.language_model_loss import LanguageModelLoss, cross_entropy

VOCABULARY = 83


def test_plain_cross_entropy_is_float32_a_few_rows_at_a_time(monkeypatch):
    """Where a model's own logits are taken: no float32 copy of them all."""
    monkeypatch.setattr(language_model_loss, "LOGITS_AT_ONCE", {"cpu": 256, "cuda": 256})
    logits, labels = torch.randn(64, 8).bfloat16().requires_grad_(), torch.randint(8, (64,))
    with LargestResult() as seen:
        loss = cross_entropy(logits, labels)
        loss.backward()
    assert seen.elements == 64 * 8
    expected = F.cross_entropy(logits.detach().float(), labels, reduction="sum")
    torch.testing.assert_close(loss.detach(), expected)


SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), "fused"),
    "qwen2-tied": (lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)), "fused"),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(**GPT2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)), "fused"),
    "t5": (lambda: T5ForConditionalGeneration(T5Config(**T5, dropout_rate=0, decoder_start_token_id=0)), "fused"),
    "gemma2-softcap": (lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8)), "labelled"),
    "cohere-scale": (lambda: CohereForCausalLM(CohereConfig(**SIZES)), "fused"),
    "granite-scale": (lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)), "fused"),
}
TARGETS = {"gpt2": ["c_attn", "c_fc"], "t5": ["q", "wo"]}


def build(name: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    return MODELS[name][0]().to(dtype)


def adapted(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """The model with a random adapter, accelerated, in training."""
    targets = options.pop("target_modules", TARGETS.get(name, "all-linear"))
    lora = LoraConfig(r=3, target_modules=targets, init_lora_weights=False, **options)
    return fastlora.accelerate(get_peft_model(build(name, dtype), lora, autocast_adapter_dtype=False)).train()


def batch() -> dict[str, Tensor]:
    """Three rows, one of them padded, half of each without labels."""
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1:6] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def transformers_loss(model: Any) -> Tensor:
    """Transformers' own loss as a sum; it computes in float32, so that for a float64 model its equation stands here."""
    out, labels = model(**batch(), use_cache=False), batch()["labels"]
    if not model.config.is_encoder_decoder:
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    own = out.loss * (labels != -100).sum()
    if model.dtype != torch.float64:
        return own
    exact = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    assert abs(exact.item() - own.item()) <= 1e-6 * own.item()
    return exact


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def assert_as_transformers(model: Any, called: Any | None = None, tolerance: float = 1e-12) -> LanguageModelLoss:
    """Loss and gradients of the trained parameters, against transformers' own loss; `called` may wrap the model."""
    parameters = trained(model)
    theirs = transformers_loss(model)
    expected = torch.autograd.grad(theirs, list(parameters.values()))
    loss = LanguageModelLoss(called or model)
    ours = loss(batch())
    assert abs(ours.item() - theirs.item()) <= tolerance * theirs.item()
    ours.backward()
    for (name, parameter), gradient in zip(parameters.items(), expected, strict=True):
        assert parameter.grad is not None, name
        error = (parameter.grad - gradient).abs().max().item()
        assert error <= tolerance * max(1.0, gradient.abs().max().item()), f"{name}: {error}"
    return loss


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("name", MODELS)
def test_an_adapted_model_has_transformers_loss_and_gradients(name):
    loss = assert_as_transformers(adapted(name))
    assert loss.path == MODELS[name][1]
    assert loss.path == "fused" or loss.reason == "the model changes the logits after its head"


@pytest.mark.usefixtures("in_blocks")
@pytest.mark.parametrize("name", MODELS)
def test_a_fully_trained_model_has_them_too(name):
    model = build(name).train()
    assert assert_as_transformers(model).path == MODELS[name][1]
    assert model.get_output_embeddings().weight.grad.abs().max() > 0


@pytest.mark.parametrize("full", [False, True], ids=["adapted", "full"])
def test_a_mixture_of_experts_whose_config_wants_it_adds_its_routers_loss(full):
    """In training; what is measured is of the tokens alone, and so is a row's own."""
    sizes = {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 1.0}
    torch.manual_seed(0)
    model: Any = MixtralForCausalLM(MixtralConfig(**sizes, output_router_logits=True)).float()
    if not full:
        lora = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        model = fastlora.accelerate(get_peft_model(model, lora))
    out, parameters = model.train()(**batch(), use_cache=False), trained(model)
    count = (batch()["labels"][:, 1:] != -100).sum()
    expected = torch.autograd.grad(out.loss * count, list(parameters.values()))
    loss = LanguageModelLoss(model)
    ours = loss(batch())
    assert loss.path == "fused" and torch.allclose(ours, out.loss * count) and out.aux_loss > 1
    for mine, theirs in zip(torch.autograd.grad(ours, list(parameters.values())), expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())
    alone = loss(batch(), torch.empty(int(count)))
    assert torch.equal(alone, ours)
    with pytest.raises(ValueError, match="output_router_logits, whose loss is no single row's"):
        loss.by_token(batch())
    model.eval()
    assert torch.allclose(loss(batch()), (out.loss - out.aux_loss) * count)


@pytest.mark.parametrize("name", ["llama", "gemma2-softcap"])
def test_float32(name):
    assert assert_as_transformers(adapted(name, torch.float32), tolerance=1e-4).path == MODELS[name][1]


@pytest.mark.parametrize("name", ["llama", "gemma2-softcap"])
def test_autocast(name):
    model = build(name, torch.float32).train()
    with torch.autocast("cpu", torch.bfloat16):
        assert assert_as_transformers(model, tolerance=0.03).path == MODELS[name][1]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing(name):
    model = adapted(name)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert assert_as_transformers(model).path == "fused"


def test_an_adapted_head_keeps_its_adapter():
    loss = assert_as_transformers(adapted("llama", target_modules=["q_proj", "lm_head"]))
    assert loss.path == "fused" and loss.reason == ""


def test_a_saved_head_is_trained():
    loss = assert_as_transformers(adapted("llama", modules_to_save=["lm_head"]))
    assert loss.path == "labelled" and "ModulesToSaveWrapper" in loss.reason


def test_a_hook_on_the_head_is_obeyed():
    model = adapted("llama")
    model.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits * 0.5)
    loss = assert_as_transformers(model)
    assert (loss.path, loss.reason) == ("labelled", "the head carries a hook")


def test_a_hook_that_comes_later_is_obeyed():
    model = adapted("llama")
    loss = LanguageModelLoss(model)
    loss(batch())
    assert loss.path == "fused"
    model.get_output_embeddings().register_forward_hook(lambda module, args, logits: logits * 0.5)
    assert torch.allclose(loss(batch()), transformers_loss(model)) and loss.path == "labelled"


class Shuffled(LlamaForCausalLM):
    """Its logits depend on other positions' logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **{**kwargs, "labels": None})
        out.logits = out.logits + out.logits.mean(1, keepdim=True)
        labels = kwargs.get("labels")
        out.loss = None if labels is None else self.loss_function(out.logits, labels, self.config.vocab_size)
        return out


class Headless(LlamaForCausalLM):
    def get_output_embeddings(self) -> None:
        return None


@pytest.mark.parametrize(
    ("kind", "reason"), [(Shuffled, "not the model's position by position"), (Headless, "names no")]
)
def test_other_models_give_their_own_logits(kind, reason):
    torch.manual_seed(0)
    loss = assert_as_transformers(kind(LlamaConfig(**SIZES)).double().train())
    assert loss.path == "all" and reason in loss.reason


@pytest.mark.parametrize("name", ["llama", "gemma2-softcap"])
def test_a_batch_without_labels_has_zero_loss_and_zero_gradients(name):
    model = adapted(name)
    unlabelled = batch()
    unlabelled["labels"] = torch.full_like(unlabelled["labels"], -100)
    loss = LanguageModelLoss(model)(unlabelled)
    assert loss == 0
    loss.backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trained(model).values())


def test_the_choice_leaves_the_model_and_the_generator_alone():
    model = adapted("llama", lora_dropout=0.5)
    model.base_model.model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    attributes, state = set(model.get_output_embeddings().__dict__), torch.get_rng_state()
    loss = LanguageModelLoss(model)
    inputs, _, _ = loss._inputs(batch())
    assert loss._choose(model.get_output_embeddings(), inputs) == ("fused", "")
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert set(model.get_output_embeddings().__dict__) == attributes
    assert all(parameter.grad is None for parameter in trained(model).values())


def test_an_error_in_the_model_leaves_its_head_alone():
    model = adapted("llama")
    loss = LanguageModelLoss(model)
    loss(batch())
    with pytest.raises(IndexError):
        loss({**batch(), "input_ids": torch.full((3, 12), VOCABULARY)})
    head = model.get_output_embeddings()
    assert not head._forward_pre_hooks and "forward" not in head.__dict__


@pytest.fixture
def process_group(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("full", [False, True], ids=["adapted", "full"])
def test_gradients_pass_through_ddp(full):
    model = build("qwen2-tied").train() if full else adapted("llama")
    wrapped = DistributedDataParallel(model)
    reduced = 0

    def count(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        nonlocal reduced
        reduced += sum(gradient.numel() for gradient in bucket.gradients())
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, count)
    assert assert_as_transformers(model, wrapped).path == "fused"
    assert reduced == sum(parameter.numel() for parameter in trained(model).values())


def test_losses_follow_peft_and_transformers_for_fifty_steps():
    histories = []
    for fast in (False, True):
        torch.manual_seed(0)
        lora = LoraConfig(r=4, target_modules="all-linear")
        model: Any = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), lora).train()
        own: Any = LanguageModelLoss(fastlora.accelerate(model)) if fast else None
        optimizer = torch.optim.AdamW(trained(model).values(), lr=3e-3)
        labelled = (batch()["labels"][:, 1:] != -100).sum()
        history = []
        for _ in range(50):
            loss = own(batch()) / labelled if fast else model(**batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            history.append(loss.item())
        histories.append(history)
    assert histories[0][-1] < histories[0][0] / 2
    for theirs, ours in zip(*histories, strict=True):
        assert abs(ours - theirs) <= 1e-4 * theirs
