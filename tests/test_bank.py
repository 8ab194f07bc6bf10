"""AdapterBank: what it puts into a model is what PEFT loads, within its budget, and a file that is not right changes nothing."""

import copy
import gc
import logging
import shutil
import time
import weakref

import pytest
import quantised_models
import tiny
import torch
from adapter_folders import A, B, change, save, tensors
from bank_folders import IDS, Q_V, alone, answer, own_model, save_several
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from quantised_models import EACH_KIND, NATIVE, a_folder  # noqa: F401  (a fixture)
from torch import nn

import fastlora
from fastlora import AdapterBank
from fastlora.adapters import AdapterError
from fastlora.peft import FusedLinear

KINDS = {
    "ragged": {"target_modules": Q_V, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "rank-stabilised": {"target_modules": "all-linear", "use_rslora": True, "lora_dropout": 0.1},
    "dora": {"target_modules": Q_V, "use_dora": True},
    "biases of B": {"target_modules": Q_V, "lora_bias": True},
    "an embedding": {"target_modules": ["embed_tokens", "lm_head"]},
    "a pattern": {"target_modules": r".*layers\.1\..*_proj"},
}


@pytest.fixture(name="bank")
def a_bank(tmp_path):
    with AdapterBank(own_model(tmp_path)) as bank:
        for name, folder in save_several(tmp_path, 4).items():
            bank.register(name, folder)
        yield bank


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def held_by(layer, name):
    """All that a LoRA layer has of an adapter."""
    everything = {**layer.__dict__, **layer._modules}
    return {
        table: value[name]
        for table, value in everything.items()
        if isinstance(value, (dict, nn.ModuleDict, nn.ParameterDict)) and name in value
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("autocast", [True, False], ids=["float32", "as the base"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_what_it_inserts_is_what_peft_loads(kind, dtype, autocast, tmp_path):
    folder = save(tmp_path / "adapter", **KINDS[kind])
    model = own_model(tmp_path, accelerated=False, dtype=dtype)
    theirs = copy.deepcopy(model)
    theirs.load_adapter(folder, "one", autocast_adapter_dtype=autocast)
    with AdapterBank(model, autocast_adapter_dtype=autocast) as bank:
        bank.register("one", folder)
        bank.load("one").result()
    ours, expected = dict(model.named_modules()), dict(theirs.named_modules())
    assert ours.keys() == expected.keys()
    for name, layer in expected.items():
        if not hasattr(layer, "lora_A"):
            continue
        got, wanted = held_by(ours[name], "one"), held_by(layer, "one")
        assert got.keys() == wanted.keys(), name
        for table, value in wanted.items():
            if isinstance(value, nn.Module):
                assert type(got[table]) is type(value) and got[table].training == value.training
                state = got[table].state_dict()
                assert state.keys() == value.state_dict().keys()
                for key, tensor in value.state_dict().items():
                    assert state[key].dtype == tensor.dtype and torch.equal(state[key], tensor), (name, table)
            elif isinstance(value, torch.Tensor):
                assert got[table].dtype == value.dtype and torch.equal(got[table], value)
            else:
                assert type(got[table]) is type(value) and (table == "lora_variant" or got[table] == value)
    for one in (model, theirs):
        one.set_adapter("one")
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, theirs(input_ids=IDS).logits)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad and ".one" in name]
    assert trained == [name for name, one in theirs.named_parameters() if one.requires_grad and ".one" in name]


def test_a_mixed_batch_is_each_row_alone(bank, tmp_path):
    rows = ["a1", "__base__", "own", "a2", "a1", "a0"]
    with bank.use(rows) as adapter_names:
        assert adapter_names == rows
        got = answer(bank.model, adapter_names)
    for row, name in zip(got, rows, strict=True):
        close(row, alone(None if name == "__base__" else tmp_path / name))
    assert all(entry.implementation != "peft" for entry in fastlora.report(bank.model))
    with bank.use(["own"]) as names, bank.use(["a1"]) as inner:
        close(answer(bank.model, names)[0], alone(tmp_path / "own"))
        close(answer(bank.model, inner)[0], alone(tmp_path / "a1"))
    with bank.use([]):
        pass
    assert bank.stats.misses == 3 and bank.stats.hits == 1 and bank.stats.loads == 3


def test_a_rank_costs_what_it_is(bank):
    for name, rank in (("a0", 2), ("a1", 3), ("a2", 4)):
        before = bank.stats.bytes
        bank.load(name).result()
        assert bank.stats.bytes - before == 2 * rank * ((32 + 32) + (32 + 16)) * 4  # two layers, float32


def test_the_least_recently_used_leaves_first(bank):
    sizes = {}
    for name in bank.registered:
        bank.load(name).result()
        sizes[name] = bank.stats.bytes - sum(sizes.values())
    assert bank.resident == ("a0", "a1", "a2", "a3")
    layer = bank.model.base_model.model.model.layers[0].self_attn.q_proj
    with bank.use(["a0", "a1", "a3"]) as names:
        answer(bank.model, names)
    assert bank.resident[0] == "a2"
    freed = weakref.ref(layer.lora_A["a2"].weight)
    bank.budget_bytes = sum(sizes.values())
    bank.swap("a0", bank._entries["a0"].folder).result()  # takes its own place
    assert bank.stats.evictions == 0
    bank.unregister("a2")
    gc.collect()
    assert freed() is None and "a2" not in layer.lora_A and "a2" not in bank.model.peft_config
    assert {*layer.r} == {*layer.scaling} == {"own", "a0", "a1", "a3"}


def test_a_budget_is_kept_and_what_is_pinned_stays(bank):
    bank.load("a2").result()
    largest = bank.stats.bytes
    bank.unregister("a2")
    bank.budget_bytes = largest + largest // 2
    bank.pin("a0").result()
    for name in ("a1", "a3", "a1", "a3"):
        with bank.use([name]):
            assert bank.stats.bytes <= bank.budget_bytes
    assert bank.resident == ("a0", "a3")
    assert bank.stats.pinned == 1 and bank.stats.evictions > 0
    bank.budget_bytes = largest // 2
    with pytest.raises(ValueError, match=r"budget_bytes=\d+: adapter 'a1' takes [\d,]+, more than those leave"):
        bank.load("a1").result()
    bank.unpin("a0")
    bank.budget_bytes = largest
    with pytest.raises(ValueError, match="budget_bytes="), bank.use(["a0", "a1", "a3"]):
        pass
    with bank.use(["a1"]):
        assert bank.resident == ("a1",)
    assert answer(bank.model, ["own"]).isfinite().all(), "the model's own is never evicted"


def test_modules_are_used_again_unless_somebody_has_hooked_them(bank, tmp_path):
    layer = bank.model.base_model.model.model.layers[0].self_attn.q_proj
    bank.load("a0").result()
    bank.budget_bytes = bank.stats.bytes
    first = layer.lora_A["a0"]
    for name in ("a3", "a0"):  # of one config
        with bank.use([name]) as names:
            close(answer(bank.model, names)[0], alone(tmp_path / name))
    assert layer.lora_A["a0"] is first
    first.register_forward_hook(lambda *_: None)
    for name in ("a3", "a0"):
        bank.load(name).result()
    assert layer.lora_A["a0"] is not first and first.weight is not layer.lora_A["a0"].weight


def test_an_active_adapter_is_not_evicted(bank):
    bank.load("a0").result()
    bank.budget_bytes = bank.stats.bytes
    bank.model.set_adapter("a0")
    with pytest.raises(ValueError, match="budget_bytes="):
        bank.load("a3").result()
    bank.model.set_adapter("own")
    bank.load("a3").result()
    assert bank.resident == ("a3",)


HOSTILE = {
    "cut off": lambda folder: (folder / "adapter_model.safetensors").write_bytes(
        (folder / "adapter_model.safetensors").read_bytes()[:-40]
    ),
    "NaN": tensors(lambda found: found[A].fill_(float("nan"))),
    "a key of the base": tensors(lambda found: found.update({"base_model.model.model.norm.weight": torch.ones(32)})),
    "a layer missing": tensors(lambda found: found.pop(B)),
    "another shape": tensors(lambda found: found.update({A: torch.ones(2, 31)})),
    "nothing changed": tensors(lambda found: [found[key].zero_() for key in found if "lora_B" in key]),
    "another config": lambda folder: change(folder, lora_alpha=77),
    "no file": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "no folder": shutil.rmtree,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_not_right_changes_nothing(name, bank, tmp_path):
    with bank.use(["a1"]) as names:
        before = answer(bank.model, names)
    keys = list(bank.model.state_dict())
    HOSTILE[name](tmp_path / "a0")
    with pytest.raises((AdapterError, OSError)):
        bank.load("a0").result()
    with pytest.raises((AdapterError, OSError)), bank.use(["a1", "a0"]):
        pass
    if name not in ("another config", "no folder"):
        with pytest.raises((AdapterError, OSError)):
            bank.swap("a1", tmp_path / "a0").result()
    assert list(bank.model.state_dict()) == keys and bank.resident == ("a1",) and bank.stats.failures >= 2
    with bank.use(["a1"]) as names:
        assert torch.equal(answer(bank.model, names), before)
    shutil.rmtree(tmp_path / "a0", ignore_errors=True)
    torch.manual_seed(100)
    save(tmp_path / "a0", target_modules=Q_V, r=2)
    with bank.use(["a0"]) as names:  # the file is right again
        close(answer(bank.model, names)[0], alone(tmp_path / "a0"))


def test_a_swap_takes_the_place_of_all_layers(bank, tmp_path):
    new = save(tmp_path / "new", target_modules=["q_proj", "down_proj"], r=5)
    with bank.use(["a0"]) as names:
        swapped = bank.swap("a0", tmp_path / "a3")
        close(answer(bank.model, names)[0], alone(tmp_path / "a0"))
        assert not swapped.done(), "not within a forward"
    swapped.result()
    with bank.use(["a0", "a1"]) as names:
        got = answer(bank.model, names)
    close(got[0], alone(tmp_path / "a3"))
    close(got[1], alone(tmp_path / "a1"))
    bank.swap("a0", new).result()  # on other layers
    with bank.use(["a0"]) as names:
        close(answer(bank.model, names)[0], alone(new))
    assert bank.stats.swaps == 2 and bank.stats.registered == 4
    layer = bank.model.base_model.model.model.layers[0].self_attn.v_proj
    assert "a0" not in layer.lora_A, "the new one has none there"
    sources = {one.name: one.source for one in fastlora.receipt(bank.model).adapters}
    assert sources["a0"].folder == str(new) and sources["a1"].folder == str(tmp_path / "a1")


def test_a_swap_waits_for_those_who_hold_the_adapter(bank, tmp_path):
    """However many forwards they run meanwhile; others' swaps and loads go on."""
    other = tmp_path / "a0"
    with bank.use(["a1"]) as names:
        before = answer(bank.model, names)
    bank.hold("a1")
    bank.hold("a1")
    job = bank.swap("a1", other)
    while not bank.swap_waits("a1"):
        assert not job.done()
        time.sleep(0.01)
    assert not bank.swap_waits("a2")
    bank.swap("a2", other).result(60)
    for _ in range(2):
        with bank.use(["a1"]) as names:
            assert torch.equal(answer(bank.model, names), before)
        assert not job.done()
        bank.let_go("a1")
    job.result(60)
    assert not bank.swap_waits("a1")
    with bank.use(["a1"]) as names:
        assert not torch.allclose(answer(bank.model, names), before)
    with pytest.raises(ValueError, match="adapter 'nobody': there is none of that name"):
        bank.hold("nobody")
    bank.hold("a3")
    bank.unregister("a3")
    bank.let_go("a3")


def test_layers_that_no_adapter_had_are_made_as_it_is_registered(tmp_path, caplog):
    model = own_model(tmp_path)
    folder = save(tmp_path / "wide", target_modules="all-linear")
    with AdapterBank(model) as bank, caplog.at_level(logging.WARNING, "fastlora"):
        bank.register("wide", folder)
        assert "10 layers are new" in caplog.text and "fastlora.accelerate(model) again" in caplog.text
        for _ in range(2):
            with bank.use(["wide", "own"]) as names:
                got = answer(model, names)
            close(got[0], alone(folder))
            close(got[1], alone(tmp_path / "own"))
            fastlora.accelerate(model)
        assert isinstance(model.base_model.model.model.layers[0].mlp.up_proj, FusedLinear)
        caplog.clear()
        bank.register("again", folder)
        assert not caplog.text and list(model.peft_config) == ["own", "wide"]


def test_unknown_names_list_those_there_are(bank):
    message = "adapter 'x': there is none of that name, expected one of a0, a1, a2, a3, own"
    for call in (bank.load, bank.pin, bank.unpin, bank.unregister, lambda name: bank.use([name]).__enter__()):
        with pytest.raises(ValueError, match=message):
            call("x")
    with pytest.raises(ValueError, match=message):
        bank.swap("x", "somewhere")


@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_registered_is_named(bank, tmp_path):
    for name, message in {"a0": "is registered already", "own": "is registered already", "a.b": "without dots"}.items():
        with pytest.raises(ValueError, match=message):
            bank.register(name, tmp_path / "a0")
    with pytest.raises(FileNotFoundError, match="there is no adapter_config.json"):
        bank.register("new", tmp_path)
    get_peft_model(tiny.llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])).save_pretrained(
        tmp_path / "ia3"
    )
    odd = {
        "peft_type": tmp_path / "ia3",
        "modules_to_save": save(tmp_path / "head", target_modules=Q_V, modules_to_save=["lm_head"]),
        "trainable_token_indices": save(tmp_path / "tokens", target_modules=Q_V, trainable_token_indices=[1]),
        "bias": save(tmp_path / "bias", target_modules=Q_V, bias="lora_only"),
    }
    for key, folder in odd.items():
        with pytest.raises(AdapterError, match=key):
            bank.register("new", folder)
    shutil.copytree(tmp_path / "a0", tmp_path / "elsewhere")
    change(tmp_path / "elsewhere", target_modules=["nothing_of_that_name"])
    with pytest.raises(AdapterError, match="PEFT cannot put it on"):
        bank.register("new", tmp_path / "elsewhere")
    assert bank.registered == ("a0", "a1", "a2", "a3")


def test_what_is_no_model_for_a_bank(tmp_path):
    with pytest.raises(TypeError, match="model: got a LlamaForCausalLM, expected a PeftModel"):
        AdapterBank(tiny.llama())
    norms = get_peft_model(tiny.llama(), LNTuningConfig(target_modules=["norm"]))
    with pytest.raises(TypeError, match="got a PeftModel with LN_TUNING, expected a PeftModel with LORA, IA3, PROMPT_"):
        AdapterBank(norms)
    with pytest.raises(ValueError, match="budget_bytes: got -1"):
        AdapterBank(get_peft_model(tiny.llama(), LoraConfig(target_modules=["q_proj"])), budget_bytes=-1)


def test_one_that_changes_nothing_is_taken_where_that_is_allowed(tmp_path):
    folder = save(tmp_path / "idle", target_modules=Q_V)
    HOSTILE["nothing changed"](folder)
    with AdapterBank(own_model(tmp_path), allow_noop=True) as bank:
        bank.register("idle", folder)
        with bank.use(["idle"]) as names:
            close(answer(bank.model, names)[0], alone(None))


@NATIVE
@EACH_KIND
def test_a_quantised_base_has_a_bank_as_any(kind, folder, tmp_path):
    model, theirs = quantised_models.load(folder, kind), quantised_models.load(folder, kind)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter.data, std=0.1)
    theirs.save_pretrained(tmp_path / "one")
    with AdapterBank(fastlora.accelerate(model)) as bank:
        bank.register("one", tmp_path / "one")
        bank.load("one").result()
        model.set_adapter("one")
        torch.testing.assert_close(run_forward(model), run_forward(theirs), rtol=1e-3, atol=1e-3)
    saved = theirs.state_dict()
    for name, tensor in model.state_dict().items():
        if ".one." in name:
            assert torch.equal(tensor, saved[name.replace(".one.", ".default.")]), name


@torch.no_grad()
def run_forward(model):
    return model.eval()(input_ids=IDS).logits


def test_a_model_with_a_bank_is_saved_as_any(bank, tmp_path):
    bank.load("a1").result()
    bank.model.save_pretrained(tmp_path / "saved", selected_adapters=["a1"])
    saved = PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved" / "a1").eval()
    with torch.no_grad():
        close(saved(input_ids=IDS).logits[0], alone(tmp_path / "a1"))
