"""`fastlora serve` with every kind of adapter that rows of a batch can have: each answer is what its adapter alone gives, by PEFT."""

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import served
import tiny
import torch
from peft import (
    CartridgeConfig,
    IA3Config,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import AutoModelForCausalLM

from fastlora.peft import known
from fastlora.peft.layers import Fused
from fastlora.serving import server
from fastlora.serving.engine import Engine, EngineError, Request, TooLong

LM: dict[str, Any] = {"task_type": "CAUSAL_LM"}
LORA: dict[str, Any] = {"target_modules": ["q_proj", "v_proj", "up_proj"], "init_lora_weights": False, **LM}
BIASED = {**LORA, "lora_bias": True, "init_lora_weights": True}
IA3: dict[str, Any] = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"], **LM}
FOLDERS: dict[str, dict[str, Any]] = {
    "LoRA": {
        "plain": LoraConfig(r=4, **LORA),
        "dora": LoraConfig(r=3, use_dora=True, **LORA),
        "dora-2": LoraConfig(r=5, use_dora=True, use_rslora=True, **LORA | {"target_modules": ["q_proj", "o_proj"]}),
        "biased": LoraConfig(r=2, **BIASED),
        "stabilised": LoraConfig(r=7, use_rslora=True, lora_dropout=0.1, **LORA),
    },
    "IA3": {"one": IA3Config(**IA3), "two": IA3Config(**IA3 | {"target_modules": ["v_proj", "down_proj"]})},
    "PROMPT_TUNING": {f"p{size}": PromptTuningConfig(num_virtual_tokens=size, **LM) for size in (2, 9)},
    "P_TUNING": {
        f"p{size}": PromptEncoderConfig(num_virtual_tokens=size, encoder_hidden_size=8, **LM) for size in (2, 5)
    },
    "PREFIX_TUNING": {f"p{size}": PrefixTuningConfig(num_virtual_tokens=size, **LM) for size in (1, 6)},
    "CARTRIDGE": {f"p{size}": CartridgeConfig(num_virtual_tokens=size, num_frozen_tokens=1, **LM) for size in (3, 4)},
}
EACH = pytest.mark.parametrize("method", FOLDERS)


def save(folder: Path, config: Any, seed: int = 0) -> None:
    torch.manual_seed(seed)
    model = tiny.llama(vocab_size=len(tiny.tokenizer()), tie_word_embeddings=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted: Any = get_peft_model(model, copy.deepcopy(config))
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "magnitude" in name:
            parameter.data *= 0.5 + torch.rand_like(parameter)
        elif parameter.requires_grad:
            parameter.data += 0.4 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)


@pytest.fixture(scope="module", name="root")
def a_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and beside it a folder of adapters for each method."""
    root = tmp_path_factory.mktemp("methods")
    tiny.save_model(root / served.BASE)
    for method, configs in FOLDERS.items():
        for seed, (name, config) in enumerate(configs.items()):
            save(root / method / name, config, seed)
    return root


def load(root: Path, method: str, **options: Any) -> Engine:
    with tiny.on_cpu():
        return server.load_engine(
            str(root / served.BASE), root / method, **{"max_rows": 6, "max_length": 200, **options}
        )


def asked_of(method: str) -> list[Request]:
    draw = torch.Generator().manual_seed(3)
    size = len(tiny.tokenizer())
    names = [served.BASE, *FOLDERS[method]]
    lengths = (1, 7, 3, 40, 1, 12)
    return [
        Request(torch.randint(5, size, (length,), generator=draw).tolist(), names[i % len(names)], 9)
        for i, length in enumerate(2 * lengths)
    ]


def alone(root: Path, method: str, asked: Sequence[Request]) -> list[str]:
    """Each answer by PEFT's own model and transformers' generation."""
    texts, models = [], dict[str, Any]()
    for one in asked:
        if one.adapter not in models:
            base: Any = AutoModelForCausalLM.from_pretrained(root / served.BASE, dtype=torch.float32)
            at = root / method / one.adapter
            models[one.adapter] = (base if one.adapter == served.BASE else PeftModel.from_pretrained(base, at)).eval()
        ids = torch.tensor([list(one.tokens)])
        options = {"max_new_tokens": one.max_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        found = models[one.adapter].generate(**given, **options)[0, -one.max_tokens :]
        texts.append(tiny.tokenizer().decode(found, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return texts


@EACH
@pytest.mark.parametrize("max_adapter_bytes", [None, 1 << 30], ids=["all", "bank"])
def test_answers_are_those_of_each_adapter_alone(root: Path, method: str, max_adapter_bytes: int | None) -> None:
    asked = asked_of(method)
    with served.running(load(root, method, max_adapter_bytes=max_adapter_bytes)) as engine:
        found = served.answers(engine, asked)
        again = [served.answers(engine, [one])[0] for one in asked[:4]]
    assert [text for text, _ in found] == alone(root, method, asked)
    assert again == found[:4] and all(finish == "length" for _, finish in found)
    assert len({text for text, _ in found}) > len(FOLDERS[method]), "they differ"


@EACH
def test_they_come_and_go_within_a_budget(root: Path, method: str) -> None:
    """With room for the largest alone, or little more."""
    asked = asked_of(method)
    with served.running(load(root, method, max_adapter_bytes=1 << 30)) as engine:
        bank = engine.adapters.bank
        assert bank is not None
        expected, sizes = served.answers(engine, asked), []
        for name in bank.registered:
            before = bank.stats.bytes
            bank.unregister(name)
            sizes.append(before - bank.stats.bytes)
    largest = max(sizes)
    with served.running(load(root, method, max_adapter_bytes=largest)) as engine:
        bank = engine.adapters.bank
        assert bank is not None
        assert served.answers(engine, asked) == expected
        stats = bank.stats
        assert stats.evictions > 0 and stats.bytes <= largest and stats.pinned == 0


@EACH
def test_a_damaged_one_is_the_error_of_who_asked(root: Path, method: str, tmp_path: Path) -> None:
    for seed, (name, config) in enumerate(list(FOLDERS[method].items())[:2]):
        save(tmp_path / method / name, config, seed)
    (tmp_path / served.BASE).symlink_to(root / served.BASE)
    good, bad = list(FOLDERS[method])[:2]
    file = tmp_path / method / bad / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with served.running(load(tmp_path, method, max_adapter_bytes=1 << 30)) as engine:
        with pytest.raises(EngineError, match=f"the adapter {bad} cannot be used"):
            served.answers(engine, [Request([5, 6], bad, 3)])
        assert served.answers(engine, [Request([5, 6], good, 3)])[0][1] == "length"


def test_a_prompts_places_are_part_of_the_length(root: Path) -> None:
    with served.running(load(root, "PROMPT_TUNING", max_length=40)) as engine:
        for adapter, room in (("p9", 31), (served.BASE, 40)):
            assert served.answers(engine, [Request([5, 6], adapter, room - 2)])[0][1] == "length"
            with pytest.raises(TooLong, match=r"(9 of the adapter's own, )?2 tokens of the prompt and \d+ of"):
                engine.submit(Request([5, 6], adapter, room - 1), served.Heard())


def test_an_answer_without_a_limit_has_the_room_that_is_left(root: Path) -> None:
    with served.listening(load(root, "PROMPT_TUNING", max_length=60)) as port:
        asked = {"messages": [{"role": "user", "content": "The cat"}], "temperature": 0}
        for adapter, places in (("p9", 9), (served.BASE, 0)):
            status, _, body = served.call(port, "/v1/chat/completions", {"model": adapter, **asked})
            assert status == 200 and body["usage"]["total_tokens"] <= 60 - places
            if body["choices"][0]["finish_reason"] == "length":
                assert body["usage"]["total_tokens"] == 60 - places


def test_a_long_prompt_behind_a_soft_one_comes_in_parts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [Request(list(range(5, 65)), "p6", 5), Request([7, 8], "p1", 5), Request(list(range(5, 60)), "p1", 5)]
    with served.running(load(root, "PREFIX_TUNING")) as engine:
        expected = [served.answers(engine, [one])[0] for one in asked]
    monkeypatch.setattr("fastlora.serving.engine.CHUNK", 25)
    with served.running(load(root, "PREFIX_TUNING")) as engine:
        assert served.answers(engine, asked) == expected


def test_who_owns_the_model_need_not_look_whether_it_has_changed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What csrc looks at is counted: once a layer after a change of the bank's or of the names, and not again in the steps that follow."""
    seen = []
    own = known.unchanged
    assert own is not None
    monkeypatch.setattr(known, "unchanged", lambda *state: seen.append(state) or own(*state))
    request = [Request([5, 6], "plain", 12), Request([7, 8], "dora", 12)]
    with served.running(load(root, "LoRA", max_adapter_bytes=1 << 30)) as engine:
        layers = sum(isinstance(module, Fused) for module in engine.model.modules())
        expected = served.answers(engine, request)
        before, steps = len(seen), engine.counts.steps
        assert served.answers(engine, request) == expected
        assert len(seen) == before and engine.counts.steps > steps + 8
        assert engine.adapters.bank is not None
        engine.adapters.bank.swap("adapter-4", root / "LoRA" / "stabilised").result()
        assert served.answers(engine, request) == expected
        assert before < len(seen) <= before + 2 * layers


def refused(root: Path, folder: Path, match: str) -> None:
    with pytest.raises(ValueError, match=match), tiny.on_cpu():
        server.load_engine(str(root / served.BASE), folder)


@pytest.mark.filterwarnings("ignore")
def test_what_shares_no_batch_is_refused_by_name(root: Path, tmp_path: Path) -> None:
    allowed = "expected LORA, IA3, PROMPT_TUNING, P_TUNING, PREFIX_TUNING or CARTRIDGE"
    sizes: Any = {"num_layers": 2, "token_dim": 16, "num_attention_heads": 2, "num_transformer_submodules": 1}
    odd = {
        rf"adapters=.*odd: it is of MULTITASK_PROMPT_TUNING, {allowed}": MultitaskPromptTuningConfig(
            num_virtual_tokens=2, num_tasks=2, **sizes, **LM
        ),
        "task_type=None: expected CAUSAL_LM of a soft prompt": PrefixTuningConfig(
            num_virtual_tokens=2, encoder_hidden_size=4, **sizes
        ),
        "bias: .*changes the base itself": LoraConfig(bias="all", **LORA),
        r"it begins within a prompt \(alora_invocation_tokens\)": LoraConfig(
            target_modules=["q_proj"], alora_invocation_tokens=[5], **LM
        ),
    }
    for number, (match, config) in enumerate(odd.items()):
        config.save_pretrained(tmp_path / str(number) / "odd")
        refused(root, tmp_path / str(number), match)


def test_one_folder_has_one_method(root: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(root / "IA3" / "one")
    (tmp_path / "b").symlink_to(root / "LoRA" / "plain")
    refused(root, tmp_path, r"adapters=.*b: it is of LORA, and .*a of IA3: a model has adapters of one method")


@pytest.mark.parametrize("kind", ["dora", "ia3"])
def test_rows_that_peft_itself_does_not_know_need_layers_of_ours(root: Path, tmp_path: Path, kind: str) -> None:
    lora = LoraConfig(use_dora=True, modules_to_save=["lm_head"], **LORA)
    save(tmp_path / "one", lora if kind == "dora" else IA3Config(modules_to_save=["lm_head"], **IA3))
    told = {"dora": "a DoRA", "ia3": "IA³"}[kind]
    refused(root, tmp_path, f"adapters=.*one: it is {told}, which shares a batch only where every adapted module")
