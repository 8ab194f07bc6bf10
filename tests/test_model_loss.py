"""`accelerate(model, loss=True)`: the model's own loss and gradients, from its labelled tokens' logits only; everything else as it was."""

import copy
import inspect
import io
import itertools
import pickle
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bounds import assert_within_bound_over_inputs
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from test_language_model_loss import MODELS as WITH_LOSS_ALONE
from test_language_model_loss import SIZES, VOCABULARY, Shuffled, process_group, trained  # noqa: F401  (a fixture)
from test_linear_cross_entropy import LargestResult
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
)

import fastlora

BART = {"vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "dropout": 0}
MOE = {
    "num_local_experts": 4,
    "experts_implementation": "eager",
    "output_router_logits": True,
    "router_aux_loss_coef": 0.5,
}
MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    **WITH_LOSS_ALONE,
    "mixtral-balance": (lambda: MixtralForCausalLM(MixtralConfig(**SIZES, **MOE)), "fused"),
    "bart-bias": (lambda: BartForConditionalGeneration(BartConfig(**BART)), "labelled"),
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return MODELS[name][0]().to(dtype).train()


def adapted(**options: Any) -> Any:
    """A llama with a random adapter, in training."""
    options = {"target_modules": "all-linear", "init_lora_weights": False, **options}
    return get_peft_model(build("llama"), LoraConfig(r=3, **options)).train()


def batch(seed: int = 3) -> dict[str, Tensor]:
    """Three rows, one of them padded, half of each without labels."""
    ids = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, 1:6] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    parameters = trained(model)
    found = torch.autograd.grad(loss, list(parameters.values()), materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def path_of(model: nn.Module) -> tuple[str, str]:
    """(path, reason) of the loss, as `report` tells them."""
    [line] = [line for line in fastlora.report(model) if line.name.rpartition(".")[2] == "loss"]
    return line[1:]


def exact_loss(model: Any, given: dict[str, Any]) -> Tensor:
    """The equation in float64: transformers itself computes it in float32."""
    out, labels = model(**given), given["labels"]
    if not model.config.is_encoder_decoder:
        labels = F.pad(labels[:, 1:], (0, 1), value=-100)
    loss = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    return loss + model.config.router_aux_loss_coef * out.aux_loss if out.get("aux_loss") is not None else loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_as_near_as_the_models_own(name, dtype):
    if dtype is torch.bfloat16 and name in ("t5", "bart-bias"):
        pytest.skip("rounds its own loss to bfloat16, where ours is float32")
    plain, exact = build(name, dtype), build(name, torch.float64)
    exact.load_state_dict(plain.state_dict())
    ours = fastlora.accelerate(copy.deepcopy(plain), loss=True)
    seeds = itertools.count()

    def compute():
        given = batch(next(seeds))
        losses = [ours(**given).loss, plain(**given).loss, exact_loss(exact, given)]
        grads = [gradients(model, loss) for model, loss in zip((ours, plain, exact), losses, strict=True)]
        of_each = [{"loss": loss.detach(), **of_one} for loss, of_one in zip(losses, grads, strict=True)]
        return {name: tuple(results[name] for results in of_each) for name in of_each[0]}

    assert_within_bound_over_inputs(compute)
    assert path_of(ours)[0] == MODELS[name][1]


@pytest.mark.parametrize("name", ["llama", "mixtral-balance", "gemma2-softcap"])
def test_the_rest_of_the_output_is_the_models_own(name):
    plain = build(name)
    asked = {**batch(), "output_hidden_states": True, "output_attentions": True, "use_cache": True}
    own, ours = plain(**asked), fastlora.accelerate(copy.deepcopy(plain), loss=True)(**asked)
    assert ours.logits is None and type(ours) is type(own)
    assert list(ours) == [name for name in own if name != "logits"]
    assert all(map(torch.equal, ours.hidden_states, own.hidden_states)) and len(ours.attentions) == len(own.attentions)
    assert ours.past_key_values.get_seq_length() == 12
    assert own.get("aux_loss") is None or torch.equal(ours.aux_loss, own.aux_loss)


@pytest.mark.parametrize("items", [7, torch.tensor(7), torch.tensor(7.5)], ids=["int", "tensor", "float"])
def test_the_sum_is_over_the_items_in_the_batch(items):
    model = build("llama")
    own = model(**batch(), num_items_in_batch=items).loss
    assert torch.allclose(fastlora.accelerate(model, loss=True)(**batch(), num_items_in_batch=items).loss, own)


def test_labels_may_be_shifted_already():
    model, given = build("llama"), batch()
    given["shift_labels"] = given["labels"].roll(-2, 1)
    own = model(**given).loss
    assert not torch.allclose(own, model(**batch()).loss)
    assert torch.allclose(fastlora.accelerate(model, loss=True)(**given).loss, own)
    assert path_of(model)[0] == "fused"


def test_arguments_may_come_by_place():
    model, given = build("llama"), batch()
    own = model(**given).loss
    names = list(LlamaForCausalLM.forward.__wrapped__.__code__.co_varnames)
    places = [given.get(name) for name in names[1 : names.index("labels") + 1]]
    assert torch.allclose(fastlora.accelerate(model, loss=True)(*places).loss, own)
    assert path_of(model)[0] == "fused"


def test_a_decoders_input_may_be_given():
    model, given = build("t5"), {**batch(), "decoder_input_ids": batch(1)["input_ids"]}
    own = model(**given).loss
    assert not torch.allclose(own, model(**batch()).loss)
    assert torch.allclose(fastlora.accelerate(model, loss=True)(**given).loss, own)


@pytest.mark.parametrize("name", ["llama", "gemma2-softcap"])
def test_a_batch_without_labels(name):
    model, given = build(name), batch()
    given["labels"] = torch.full_like(given["labels"], -100)
    assert model(**given).loss.isnan()
    fastlora.accelerate(model, loss=True)
    assert model(**given).loss.isnan()
    loss = model(**given, num_items_in_batch=4).loss
    assert loss == 0 and not any(gradient.any() for gradient in gradients(model, loss).values())


@pytest.mark.parametrize("name", ["llama", "gemma2-softcap"])
def test_no_tensor_has_all_positions_logits(name):
    model = fastlora.accelerate(build(name).requires_grad_(False), loss=True)
    model.get_input_embeddings().requires_grad_()
    model(**batch())
    with LargestResult() as seen:
        model(**batch()).loss.backward()
    assert 0 < seen.elements < 3 * 12 * VOCABULARY


def own_calls() -> dict[str, tuple[Callable[[Any], dict[str, Any]], str]]:
    """Calls that are the model's own, by what prepares the model and gives its arguments, and what `report` says."""
    return {
        "eval": (lambda model: batch() if model.eval() else {}, "the model was in eval mode"),
        "logits_to_keep": (lambda model: {**batch(), "logits_to_keep": torch.arange(12)}, "logits_to_keep was given"),
        "cache": (lambda model: {**batch(), "past_key_values": DynamicCache()}, "past_key_values was given"),
        "ignore": (
            lambda model: {**batch(), "labels": batch()["input_ids"], "ignore_index": 5},
            "ignore_index was not -100",
        ),
        "tuple": (lambda model: {**batch(), "return_dict": False}, "return_dict was False"),
    }


@pytest.mark.parametrize("case", own_calls())
def test_such_calls_are_the_models_own(case):
    prepare, reason = own_calls()[case]
    model = build("llama")
    own = model(**prepare(model))
    fastlora.accelerate(model, loss=True)
    ours = model(**prepare(model))
    assert torch.equal(ours[0], own[0]) and torch.equal(ours[1], own[1])
    assert path_of(model) == ("all", f"its last call was the model's own: {reason}")


def test_without_gradients_or_labels_logits_stay():
    model = build("llama")
    own = model(**batch())
    fastlora.accelerate(model, loss=True)
    with torch.no_grad():
        ours = model(**batch())
    assert torch.equal(ours.loss, own.loss) and torch.equal(ours.logits, own.logits)
    assert "gradients were off" in path_of(model)[1]
    assert torch.equal(model(**{**batch(), "labels": None}).logits, own.logits)
    model(**batch())
    assert path_of(model) == ("fused", "logits of labelled tokens only, a block of the vocabulary at a time")


def test_what_torch_wants_beside_the_values_is_the_models_own():
    model = fastlora.accelerate(build("llama"), loss=True)
    with forward_ad.dual_level():
        assert model(**batch()).logits is not None
    assert "forward-mode differentiation is on" in path_of(model)[1]


def test_generate_is_the_models_own():
    model, prompt = build("llama"), batch()["input_ids"][:1, :4]
    own = model.generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(fastlora.accelerate(model, loss=True).generate(prompt, max_new_tokens=6, do_sample=False), own)


class Penalised(LlamaForCausalLM):
    """Its loss looks at the logits once more."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        if out.loss is not None:
            out.loss = out.loss + out.logits.pow(2).mean()
        return out


class Relabelled(LlamaForCausalLM):
    """Not all labels count for it, in long rows or in all."""

    always = True

    def forward(self, *args: Any, labels: Any = None, **kwargs: Any) -> Any:
        if labels is not None and (self.always or labels.shape[1] == 12):
            labels = labels.masked_fill(labels < 40, -100)
        return super().forward(*args, labels=labels, **kwargs)


class RelabelledLate(Relabelled):
    """Which its first few tokens do not show."""

    always = False


class Listed(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        return [out.loss, out.logits]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Shuffled, "not the model's position by position"),
        (Penalised, "loss is not its labelled tokens' cross entropy"),
        (Relabelled, "changes its labels"),
        (RelabelledLate, "changes its labels"),
        (Listed, "returns a list"),
    ],
)
def test_other_models_keep_their_own_loss(kind, reason):
    torch.manual_seed(0)
    model = kind(LlamaConfig(**SIZES)).train()
    own = model(**batch())
    fastlora.accelerate(model, loss=True)
    assert model(batch()["input_ids"]) is not None
    ours = model(**batch())
    assert all(torch.equal(one, other) for one, other in zip(ours, own, strict=True) if isinstance(own, list))
    assert isinstance(own, list) or (torch.equal(ours.loss, own.loss) and torch.equal(ours.logits, own.logits))
    assert path_of(model)[0] == "all" and reason in path_of(model)[1]


def test_a_loss_function_of_its_own_stays():
    model = build("llama")
    model.loss_function = lambda logits, **rest: logits.sum()
    own = model(**batch()).loss
    assert torch.equal(fastlora.accelerate(model, loss=True)(**batch()).loss, own)
    assert path_of(model) == ("all", "the model's own loss: its loss function is <lambda>")


@pytest.mark.parametrize(
    ("options", "path", "reason"),
    [
        ({"target_modules": ["q_proj", "lm_head"]}, "fused", "a block of the vocabulary at a time"),
        ({"modules_to_save": ["lm_head"]}, "labelled", "the head is a ModulesToSaveWrapper"),
    ],
)
def test_an_adapted_or_saved_head_is_trained(options, path, reason):
    model = adapted(**options)
    own = model(**batch()).loss
    expected = gradients(model, own)
    ours = fastlora.accelerate(model, loss=True)(**batch()).loss
    assert torch.allclose(ours, own) and path_of(model) == (path, f"logits of labelled tokens only, {reason}")
    for name, gradient in gradients(model, ours).items():
        assert torch.allclose(gradient, expected[name], rtol=1e-3, atol=1e-5), name


def test_a_hook_on_the_head_that_comes_later_is_obeyed():
    model = fastlora.accelerate(build("llama"), loss=True)
    before = model(**batch()).loss
    model.lm_head.register_forward_hook(lambda module, args, logits: logits * 0.5)
    after = model(**batch()).loss
    assert path_of(model)[0] == "labelled" and "hook" in path_of(model)[1]
    assert not torch.allclose(after, before) and torch.allclose(after, fastlora.restore(model)(**batch()).loss)


def test_a_model_without_a_head_is_an_error_and_stays():
    model = get_peft_model(LlamaModel(LlamaConfig(**SIZES)), LoraConfig(target_modules=["v_proj"]))
    with pytest.raises(ValueError, match="loss=True: .*no transformers model with a language model's head"):
        fastlora.accelerate(model, loss=True)
    assert all(line.implementation == "peft" for line in fastlora.report(model))


def test_the_class_is_the_same_by_name(tmp_path):
    model = fastlora.accelerate(build("llama"), loss=True)
    kind: Any = type(model)
    assert isinstance(model, LlamaForCausalLM) and kind is not LlamaForCausalLM
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(kind, name) == getattr(LlamaForCausalLM, name)
    assert type(fastlora.accelerate(build("llama"), loss=True)) is kind
    assert inspect.signature(model.forward) == inspect.signature(build("llama").forward)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is LlamaForCausalLM and again.config.architectures == ["LlamaForCausalLM"]
    assert model.can_generate() and torch.equal(again.lm_head.weight, model.lm_head.weight)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    torch.save(model, file := io.BytesIO())
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_a_copy_has_its_own_weights_and_the_loss(copied):
    model = fastlora.accelerate(build("llama"), loss=True)
    before = model(**batch()).loss
    other = copied(model)
    assert type(other) is type(model) and path_of(other) == path_of(model)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert torch.equal(other(**batch()).loss, before) and not torch.allclose(model(**batch()).loss, before)
    assert type(fastlora.restore(other)) is LlamaForCausalLM and path_of(model)[0] == "fused"


def test_accelerate_and_restore_may_come_twice():
    model = adapted()
    own = model(**batch()).loss
    for _ in range(2):
        fastlora.accelerate(model, loss=True)
        assert torch.allclose(model(**batch()).loss, own) and path_of(model)[0] == "fused"
    fastlora.accelerate(model)
    assert path_of(model)[0] == "fused", "without loss=True a swapped loss stays, as frozen layers do"
    for _ in range(2):
        fastlora.restore(model)
        assert type(model.get_base_model()) is LlamaForCausalLM
        assert torch.equal(model(**batch()).loss, own) and model(**batch()).logits is not None


def test_a_kept_method_runs_the_models_own_forward_after_restore():
    model = fastlora.accelerate(build("llama"), loss=True)
    kept = model.forward
    fastlora.restore(model)
    assert kept(**batch()).logits is not None


@pytest.mark.parametrize("method", ["unload", "merge_and_unload"])
def test_what_peft_unloads_has_nothing_of_ours(method):
    unloaded = getattr(fastlora.accelerate(adapted(), loss=True), method)()
    assert type(unloaded) is LlamaForCausalLM
    assert not any("fastlora" in f"{type(module).__module__} {list(vars(module))}" for module in unloaded.modules())


def test_full_training_and_frozen_layers_may_have_the_loss():
    model = build("llama")
    own = model(**batch()).loss
    assert torch.allclose(fastlora.accelerate(model, loss=True, frozen=True)(**batch()).loss, own)
    model.requires_grad_(False).model.norm.requires_grad_()
    fastlora.accelerate(model, loss=True, frozen=True)
    assert torch.allclose(model(**batch()).loss, own)
    assert {"lm_head", "loss"} <= {line.name for line in fastlora.report(model)} and path_of(model)[0] == "fused"


def assert_same_losses_in_training(model: Any, plain: Any, called: Any = None, tolerance: float = 1e-4) -> None:
    for _ in range(2):
        ours, own = (model if called is None else called)(**batch()).loss, plain(**batch()).loss
        assert abs(ours - own) <= tolerance * own
        expected = gradients(plain, own)
        ours.backward()
        for name, parameter in trained(model).items():
            bound = 10 * tolerance * max(1.0, expected[name].abs().max().item())
            assert (parameter.grad - expected[name]).abs().max() <= bound, name
            parameter.grad = None


def both(**options: Any) -> tuple[Any, Any]:
    return fastlora.accelerate(adapted(**options), loss=True), adapted(**options)


def test_gradient_checkpointing():
    model, plain = both()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    assert_same_losses_in_training(model, plain)
    assert path_of(model)[0] == "fused"


def test_autocast():
    model, plain = both()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_losses_in_training(model, plain, tolerance=0.03)
    assert path_of(model)[0] == "fused"


def test_compiled_layers():
    model, plain = both()
    for layer in model.base_model.model.model.layers:
        layer.compile(backend="eager")
    assert_same_losses_in_training(model, plain)
    assert path_of(model)[0] == "fused"


def test_a_model_compiled_as_a_whole_keeps_its_own_loss():
    model, plain = both()
    assert torch.compile(model, backend="eager", fullgraph=True)(**batch()).logits is not None
    assert_same_losses_in_training(model, plain, torch.compile(model, backend="eager"))


@pytest.mark.usefixtures("process_group")
def test_ddp():
    model, plain = both()
    assert_same_losses_in_training(model, plain, DistributedDataParallel(model))
    full = fastlora.accelerate(build("qwen2-tied"), loss=True)
    assert_same_losses_in_training(full, build("qwen2-tied"), DistributedDataParallel(full))
    assert path_of(model)[0] == path_of(full)[0] == "fused"


def test_soft_prompts_of_peft():
    torch.manual_seed(0)
    prompted = get_peft_model(build("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)).train()
    own = prompted(**batch()).loss
    assert torch.allclose(fastlora.accelerate(prompted, loss=True)(**batch()).loss, own)
    assert path_of(prompted)[0] == "fused"


def test_threads_may_share_the_model():
    """One of them does not record gradients, and gets logits."""
    model = fastlora.accelerate(build("llama"), loss=True)

    def result(seed: int) -> Tensor:
        with torch.set_grad_enabled(seed > 0):
            out = model(**batch(seed))
        return out.loss if seed else out.logits

    expected = [result(seed) for seed in range(4)]
    found: list[tuple[int, Tensor]] = []

    def work(seed: int) -> None:
        found.extend((seed, result(seed)) for _ in range(20))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80 and all(torch.equal(value, expected[seed]) for seed, value in found)


def test_a_trl_that_reads_logits_gets_them(monkeypatch):
    model = fastlora.accelerate(build("llama"), loss=True)
    monkeypatch.setitem(sys.modules, "trl.trainer.sft_trainer", types.ModuleType("sft_trainer"))
    assert model(**batch()).logits is not None and "TRL reads the logits" in path_of(model)[1]


def test_an_error_in_the_model_leaves_nothing_behind():
    model = fastlora.accelerate(build("llama"), loss=True)
    before = model(**batch()).loss
    attributes = set(vars(model)) | set(vars(model.lm_head))
    with pytest.raises(IndexError):
        model(**{**batch(), "input_ids": torch.full((3, 12), VOCABULARY)})
    assert set(vars(model)) | set(vars(model.lm_head)) == attributes
    assert torch.equal(model(**batch()).loss, before)
