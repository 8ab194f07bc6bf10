"""LoRA on a mixture's experts: PEFT's results from each expert's rows, and nothing of the size of the experts made on the way."""

import copy
import itertools
import pickle

import pytest
import torch
from bounds import assert_within_bound_over_inputs
from moe_models import (
    FAMILIES,
    IDS,
    PARAMETERS,
    E,
    call,
    config,
    moe_model,
    routed,
    run,
    set_implementation,
    wrapper_of,
)
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from peft_models import assert_as_near_as
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora
from fastlora import ops
from fastlora.peft import experts

DTYPES = {
    "float32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float32-on-bfloat16": (torch.bfloat16, True),
}


def assert_module_within_bound(family, dtype, adapters_float32, **options):
    """The result and every gradient of one module of experts, over several inputs."""
    model = moe_model(family, dtype, autocast_adapter_dtype=adapters_float32, **options)
    exact = wrapper_of(set_implementation(copy.deepcopy(model).double(), "eager"))
    peer = wrapper_of(copy.deepcopy(model))
    ours = wrapper_of(fastlora.accelerate(model))
    assert experts.is_derived(ours)
    seeds = itertools.count()

    def compute():
        given = routed(seed=next(seeds), dtype=dtype)
        runs = call(ours, given), call(peer, given), call(exact, given.to(torch.float64))
        assert experts.OWN_FORWARD not in ours.__dict__
        return {name: tuple(results[name] for results in runs) for name in runs[0]}

    assert_within_bound_over_inputs(compute)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_results_and_gradients_are_pefts(family, dtype):
    assert_module_within_bound(family, *DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_all_experts_at_once_give_the_same(family, dtype, monkeypatch):
    """As on a card, by torch's grouped products."""
    monkeypatch.setattr(experts, "GROUPED", ("cpu",))
    in_turn = []
    monkeypatch.setattr(experts, "_in_turn", lambda *args: in_turn.append(args))
    assert_module_within_bound(family, *DTYPES[dtype], r=8)
    assert not in_turn


@pytest.mark.parametrize("parameters", [[one] for one in PARAMETERS], ids=["up", "down"])
def test_one_projection_alone_has_adapters(parameters):
    assert_module_within_bound("olmoe", torch.float32, True, parameters=parameters)


@pytest.mark.parametrize("family", FAMILIES)
def test_models_equal_peft(family):
    model = moe_model(family)
    exact = run(set_implementation(copy.deepcopy(model).double(), "eager"))
    eager = run(model)
    names = set(model.state_dict())
    assert fastlora.accelerate(model) is model
    ours = run(model)
    assert_as_near_as(ours, eager, exact)
    assert set(model.state_dict()) == names
    assert {entry.implementation for entry in fastlora.report(model)} <= {"cpu", "reference"}


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_gradients_are_the_derivatives(family):
    wrapper = wrapper_of(fastlora.accelerate(moe_model(family, r=1).double()))
    given = routed(T=3, dtype=torch.float64)
    trained = [p for p in wrapper.parameters() if p.requires_grad]
    tensors = given.x.requires_grad_(), given.weights.requires_grad_(), *trained
    fast = {"fast_mode": True, "check_undefined_grad": False}
    assert torch.autograd.gradcheck(lambda x, weights, *_: wrapper(x, given.index, weights), tensors, **fast)


def test_an_expert_without_rows_has_gradients_of_zeros():
    wrapper = wrapper_of(fastlora.accelerate(moe_model()))
    found = call(wrapper, routed())
    idle = E - 2
    for name, gradient in found.items():
        if "lora_A" in name:
            own = gradient.view(E, -1, gradient.shape[1])[idle]
        elif "lora_B" in name:
            own = gradient.view(len(gradient), -1, E)[..., idle]
        else:
            continue
        assert not own.any() and gradient.any(), name


class LargestMade(TorchDispatchMode):
    """The elements of the largest tensor that an operation made."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        if not func.is_view:
            for one in results if isinstance(results, (tuple, list)) else [results]:
                if isinstance(one, torch.Tensor):
                    self.elements = max(self.elements, one.numel())
        return results


def test_nothing_of_the_experts_size_is_made():
    model = moe_model(r=1)
    size = wrapper_of(model).get_base_layer().down_proj.numel()
    given = routed(T=4)
    for accelerated in (False, True):
        wrapper = wrapper_of(fastlora.accelerate(model) if accelerated else model)
        with LargestMade() as made:
            call(wrapper, given)
        assert (made.elements < size) == accelerated


def test_only_experts_with_rows_are_called(monkeypatch):
    wrapper, called = wrapper_of(fastlora.accelerate(moe_model())), []
    compute = experts.lora_linear.compute
    monkeypatch.setattr(experts.lora_linear, "compute", lambda *args: called.append(len(args[0])) or compute(*args))
    given = routed()
    wrapper(given.x, given.index, given.weights)
    assert len(called) == 2 * (E - 1) and sum(called) == 2 * given.index.numel() and all(called)


def projection(N, K, r, dtype=torch.float32):
    adapters = [torch.empty(2 * r, K)], [torch.empty(N, 2 * r)], [1.0]
    return experts.Projection(torch.empty(2, N, K, dtype=dtype), None, *(adapters if r else ([], [], [])))


def test_torchs_grouped_products_take_what_begins_at_16_bytes(monkeypatch):
    def is_grouped(up=(8, 12, 4), down=(12, 4, 8), dtype=torch.float32):
        plan = experts.Plan(None, projection(*up, dtype=dtype), projection(*down, dtype=dtype))
        return experts._is_grouped(plan, torch.empty(1, dtype=dtype))

    assert not is_grouped()
    monkeypatch.setattr(experts, "GROUPED", ("cpu",))
    assert is_grouped() and is_grouped(up=(8, 12, 0)) and not is_grouped(dtype=torch.float64)
    assert not is_grouped(dtype=torch.bfloat16)  # 12 columns are 24 bytes
    assert is_grouped((8, 16, 8), (16, 8, 8), torch.bfloat16)
    for wrong in range(3):
        odd = [8, 8, 8]
        odd[wrong] = 6
        assert not is_grouped(up=odd) and not is_grouped(down=odd)


def test_two_steps_are_bitwise_equal():
    model = fastlora.accelerate(moe_model())
    first, second = run(model), run(model)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_gate_with_silu_is_one_operator_and_every_other_is_its_modules(monkeypatch):
    """Also where the function is hooked, and where plain PyTorch was measured to be as fast."""
    if not ops.has("swiglu", "cpu"):
        pytest.skip("the extension is not built")
    wrapper, calls, seen = wrapper_of(fastlora.accelerate(moe_model())), [], []
    module, run_gate, given = experts.wrappers_of(wrapper)[1], experts.swiglu.swiglu, routed()
    monkeypatch.setattr(experts.swiglu, "swiglu", lambda *args: calls.append(args) or run_gate(*args))
    monkeypatch.setattr(ops, "forced", "cpu")

    def count():
        calls.clear()
        wrapper(given.x, given.index, given.weights)
        return len(calls)

    assert count() == E - 1
    hook = module.act_fn.register_forward_hook(lambda *_: seen.append(1))
    assert count() == 0 and len(seen) == E - 1
    hook.remove()
    assert count() == E - 1
    monkeypatch.setattr(type(module), "_apply_gate", lambda self, h: h[:, : h.shape[1] // 2])
    assert count() == 0
    monkeypatch.undo()
    monkeypatch.setattr(module, "act_fn", torch.nn.GELU())
    monkeypatch.setattr(experts.swiglu, "swiglu", None)
    wrapper(given.x, given.index, given.weights)
    module.act_fn = torch.nn.SiLU()
    monkeypatch.setattr(ops, "forced", "reference")
    wrapper(given.x, given.index, given.weights)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_rows_go_to_their_experts_and_back(k):
    """And their gradients, as through torch's own index_select."""
    x = torch.randn(5, 4, requires_grad=True)
    order = torch.randperm(5 * k)
    rows = experts._Dispatch.apply(x, order, order.argsort(), k)
    plain = x[:, None].expand(-1, k, -1).flatten(0, 1).index_select(0, order)
    dy = torch.randn_like(plain)
    found, expected = (torch.autograd.grad(one, x, dy)[0] for one in (rows, plain))
    assert torch.equal(rows, plain) and torch.allclose(found, expected)


def test_checkpointing_gives_the_same():
    model = fastlora.accelerate(moe_model()).train()
    plain = run(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpointed = run(model)
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)


def test_a_compiled_model_runs_pefts_own_forward():
    model = fastlora.accelerate(moe_model())
    eager = run(model)
    wrapper = wrapper_of(model)
    del wrapper.__dict__[experts.SEEN]
    compiled = torch.compile(wrapper, backend="eager")
    given = routed()
    with torch.no_grad():
        expected = wrapper(given.x, given.index, given.weights)
        del wrapper.__dict__[experts.SEEN]
        found = compiled(given.x, given.index, given.weights)
    assert torch.allclose(found, expected, atol=1e-5) and experts.SEEN not in wrapper.__dict__
    assert all(torch.equal(eager[name], one) for name, one in run(model).items())


# ---- PEFT's own business


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture(name="pair")
def a_pair():
    """An accelerated model and the same one left to PEFT, each with the adapters `default` and `other`, in eval mode."""
    model = fastlora.accelerate(moe_model())
    torch.manual_seed(1)
    model.add_adapter("other", config(r=2))
    peer = fastlora.restore(copy.deepcopy(model))
    assert not any(experts.is_derived(module) for module in peer.modules())
    return model.eval(), peer.eval()


def test_adapters_go_on_working(pair):
    model, peer = pair
    assert experts.is_derived(wrapper_of(model))
    for do in (
        lambda m: m.set_adapter("other"),
        lambda m: m.base_model.set_adapter(["default", "other"]),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
        lambda m: m.set_adapter("default"),
        lambda m: m.merge_adapter(),
        lambda m: m.unmerge_adapter(),
        lambda m: m.delete_adapter("other"),
    ):
        do(model)
        do(peer)
        assert torch.allclose(logits(model), logits(peer), atol=1e-4)


def test_gradients_of_several_active_adapters(pair):
    for model in pair:
        model.base_model.set_adapter(["default", "other"])
    ours, peers = map(run, pair)
    assert any("other" in name for name in ours)
    for name in peers:
        assert torch.allclose(ours[name], peers[name], atol=1e-5, rtol=1e-3), name


def test_files_are_pefts(pair, tmp_path):
    model, peer = pair
    model.save_pretrained(tmp_path / "ours")
    peer.save_pretrained(tmp_path / "peer")
    for file in ("adapter_model.safetensors", "other/adapter_model.safetensors"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "peer" / file).read_bytes()
    again = PeftModel.from_pretrained(peer.unload(), tmp_path / "ours").eval()
    assert torch.allclose(logits(fastlora.accelerate(again)), logits(model), atol=1e-5)


@pytest.mark.parametrize("merge", [False, True])
def test_unloading_hands_out_a_plain_model(pair, merge):
    plain = [m.merge_and_unload() if merge else m.unload() for m in pair]
    assert not any(isinstance(module, ParamWrapper) for module in plain[0].modules())
    assert torch.allclose(*map(logits, plain), atol=1e-4)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_are_accelerated(again):
    model = fastlora.accelerate(moe_model()).eval()
    other = again(model)
    assert type(wrapper_of(other)) is type(wrapper_of(model)) and experts.is_derived(wrapper_of(other))
    assert torch.equal(logits(other), logits(model))


def test_restore_undoes_it():
    model = moe_model().eval()
    own, kept = logits(model), set(wrapper_of(model).__dict__)
    fastlora.accelerate(model)
    logits(model)
    fastlora.restore(model)
    assert type(wrapper_of(model)) is ParamWrapper and set(wrapper_of(model).__dict__) == kept
    assert torch.equal(logits(model), own)


def test_a_wrapper_that_is_wrapped_again():
    """PEFT finds it by the name of its class; the new one around it is swapped by the next call."""
    model = fastlora.accelerate(moe_model(parameters=PARAMETERS[:1]))
    wrapper = wrapper_of(model)
    outer = ParamWrapper(wrapper, "default", "down_proj", config(), r=3, lora_alpha=6)
    model.base_model.model.model.layers[0].mlp.experts = outer
    expected = call(fastlora.restore(copy.deepcopy(outer)), routed())
    found = call(
        outer, routed()
    )  # by PEFT's forward outside, ours inside: the module's parameter is then what PEFT has made of it
    assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in expected)
    fastlora.accelerate(model)
    assert experts.is_derived(outer) and not experts.is_derived(wrapper)
    found = call(outer, routed())
    assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in expected)
