"""target_modules: every name is trained, or an error says which is not."""

from dataclasses import replace

import pytest
from peft import LoraConfig, get_peft_model
from training import a_base, a_config, adapter, on_cpu, one_thread, some_data  # noqa: F401  (fixtures)
from transformers import AutoModelForCausalLM

from fastlora import trainable
from fastlora.train import train


@pytest.fixture(scope="module")
def llama(base):
    return AutoModelForCausalLM.from_pretrained(base)


LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ("all-linear", LINEAR),
        (["all-linear"], LINEAR),
        (["all-linear", "lm_head"], LINEAR | {"lm_head"}),
        (["lm_head", "All-Linear", "lm_head", "q_proj"], LINEAR | {"lm_head"}),
        (["q_proj", "q_proj"], {"q_proj"}),
        (["self_attn.q_proj", "model.layers.0.mlp.up_proj"], {"q_proj", "up_proj"}),
        (r".*\.(q|v)_proj", {"q_proj", "v_proj"}),
    ],
)
def test_every_named_module_is_trained(base, named, expected):
    model = AutoModelForCausalLM.from_pretrained(base)
    peft_model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", target_modules=trainable.targets(model, named))
    )
    found = {name.rpartition(".")[2] for name, module in peft_model.named_modules() if hasattr(module, "lora_A")}
    assert found == expected


@pytest.mark.parametrize(
    ("named", "unmatched"),
    [
        (["q_proj", "foo_proj"], "'foo_proj'"),
        (["all-linear", "nope", "bar"], "'bar', 'nope'"),
        (["q_proj", ""], "''"),
        ([" q_proj"], "' q_proj'"),
        (["proj"], "'proj'"),
        (["q_proj "], "'q_proj '"),
    ],
)
def test_a_name_that_matches_nothing_is_an_error_that_lists_some_that_do(llama, named, unmatched):
    with pytest.raises(ValueError, match=rf"^target_modules: no module is called {unmatched}; there are .*q_proj"):
        trainable.targets(llama, named)


def test_a_regular_expression_is_pefts_and_must_match_a_whole_name(llama):
    assert trainable.targets(llama, ".*q_proj") == ".*q_proj"
    with pytest.raises(ValueError, match=r"^target_modules='q_proj': the regular expression matches no module's whole"):
        trainable.targets(llama, "q_proj")


def test_training_says_which_name_matches_nothing_and_which_module_is_no_layer(config):
    with pytest.raises(ValueError, match="^target_modules: no module is called 'foo_proj'; there are "):
        train(replace(config, target_modules=["q_proj", "foo_proj"]), progress=False)
    with pytest.raises(ValueError, match=r"(?s)^target_modules=\['mlp'\]: .*not supported"):
        train(replace(config, target_modules=["mlp"]), progress=False)
    assert not config.output.exists()


def test_all_linear_and_the_head_are_trained_together(config):
    result = train(replace(config, target_modules=["all-linear", "lm_head"], max_steps=1), progress=False)
    assert len(adapter(config.output)) == 2 * 15 and sum(result.implementations.values()) == 15
