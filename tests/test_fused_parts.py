"""fusion.py, a part at a time: which modules are what their names say, what stands in an operator's way, what is told. test_fusion.py has models."""

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from fastlora import fusion, ops, swap
from fastlora.operators import attention, rms_norm, rotary, swiglu

CONFIG = LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2)
CONFIG._attn_implementation = "sdpa"


def is_swapped(module: nn.Module) -> bool:
    before = type(module)
    fusion.attach(nn.ModuleList([module]))
    assert (type(module) is not before) is swap.is_derived(module)
    return swap.is_derived(module)


def seen(module: nn.Module) -> fusion.Seen:
    found: fusion.Seen = module.__dict__[fusion.SEEN]
    return found


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operators that have run so far."""
    names: list[str] = []
    for module in (rms_norm, swiglu, rotary, attention):
        name = module.__name__.rpartition(".")[2]

        def run(*args: Any, name: str = name, own: Callable[..., Any] = module.run) -> Any:
            names.append(name)
            return own(*args)

        monkeypatch.setattr(module, "run", run)
    return names


# ---- norms


class AddsOneRMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) + hidden_states


class TrainedRMSNorm(LlamaRMSNorm):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.shift = nn.Parameter(torch.zeros(1))


class WrappingRMSNorm(LlamaRMSNorm):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.inner = nn.Identity()


class Scale(LlamaRMSNorm):
    pass


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: LlamaRMSNorm(8), True),
        (lambda: LlamaRMSNorm(8).bfloat16(), True),
        (lambda: nn.RMSNorm(8, eps=1e-5), True),
        (lambda: nn.RMSNorm(8), False),  # whose eps is what its dtype says
        (lambda: nn.RMSNorm(8, eps=1e-5, elementwise_affine=False), False),
        (lambda: nn.RMSNorm((3, 8), eps=1e-5), False),
        (lambda: AddsOneRMSNorm(8), False),
        (lambda: TrainedRMSNorm(8), False),
        (lambda: WrappingRMSNorm(8), False),
        (lambda: Scale(8), False),  # whose name promises nothing
    ],
)
def test_which_norms_are_fused(make: Callable[[], nn.Module], expected: bool) -> None:
    module = make()
    for parameter in module.parameters():
        parameter.data.normal_(1, 0.5)
    assert is_swapped(module) is expected


@pytest.mark.parametrize(
    ("dtype", "trained", "obstacle"),
    [
        (torch.float32, False, None),
        (torch.float32, True, "its weight is trained"),
        (torch.bfloat16, False, "it is given bfloat16 [2, 5, 8] on cpu and float32 [8] on cpu"),
    ],
)
def test_a_norm(dtype: torch.dtype, trained: bool, obstacle: str | None, ran: list[str]) -> None:
    module, plain = LlamaRMSNorm(8, eps=1e-2), LlamaRMSNorm(8, eps=1e-2)
    for one in (module, plain):
        one.weight.data = torch.arange(8.0)
        one.weight.requires_grad_(trained)
    assert is_swapped(module)
    x = torch.randn(2, 5, 8).to(dtype) / 10
    torch.testing.assert_close(module(x), plain(x))
    assert ran == ["rms_norm"] * (obstacle is None)
    found = seen(module)
    assert found[:4] == (10, 80, dtype, torch.device("cpu"))
    assert found.obstacle == obstacle


# ---- gated MLPs


class Ungated(LlamaMLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


class UngatedMLP(Ungated):
    pass


class ScaledMLP(LlamaMLP):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(1))


class DroppingMLP(LlamaMLP):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(0.5)


@pytest.mark.parametrize(
    ("kind", "expected"), [(LlamaMLP, True), (UngatedMLP, False), (ScaledMLP, False), (DroppingMLP, False)]
)
def test_which_mlps_are_fused(kind: Any, expected: bool) -> None:
    assert is_swapped(kind(CONFIG)) is expected


def mlp(columns: int = 48) -> tuple[Any, Any]:
    """A fused one and itself."""
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=columns)
    module, plain = LlamaMLP(config), LlamaMLP(config)
    plain.load_state_dict(module.state_dict())
    assert is_swapped(module)
    return module, plain


@pytest.mark.parametrize("columns", [48, 1])
def test_an_mlp(columns: int, ran: list[str]) -> None:
    module, plain = mlp(columns)
    x = torch.randn(2, 5, 32)
    torch.testing.assert_close(module(x), plain(x))
    assert ran == ["swiglu"] and seen(module) == (10, 10 * columns, torch.float32, torch.device("cpu"), None)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_an_mlp_without_columns() -> None:
    module, plain = mlp(0)
    x = torch.randn(2, 5, 32)
    assert torch.equal(module(x), plain(x))


@pytest.mark.parametrize("of_up", [lambda up: up.double(), lambda up: 2.0], ids=["float64", "a number"])
def test_an_mlp_whose_layers_differ_runs_as_it_is(of_up: Callable[[Tensor], Any], ran: list[str]) -> None:
    module, plain = mlp()
    x = torch.randn(2, 5, 32)
    for one in (module, plain):
        one.up_proj.register_forward_hook(lambda _, args, output: of_up(output))
        one.down_proj.to((one.act_fn(one.gate_proj(x)) * one.up_proj(x)).dtype)
    assert torch.equal(module(x), plain(x)) and not ran
    assert str(seen(module).obstacle).startswith("it is given float32 [2, 5, 48] on cpu and ")


def test_a_transform_runs_the_modules_own(ran: list[str]) -> None:
    module = LlamaRMSNorm(8).requires_grad_(False)
    x, expected = torch.randn(3, 5, 8), LlamaRMSNorm(8)
    assert is_swapped(module)
    assert torch.equal(torch.func.vmap(module)(x), torch.func.vmap(expected)(x)) and not ran
    assert str(seen(module).obstacle).startswith("a transform of torch.func is at work")


def test_the_numbers_that_are_tried_are_like_the_weight() -> None:
    like = torch.empty(1, dtype=torch.bfloat16, device="meta")
    assert (fusion._drawn(3, 2, like=like).dtype, fusion._drawn(3, 2, like=like).device) == (like.dtype, like.device)
    assert torch.equal(fusion._drawn(3, 2), fusion._drawn(3, 2)) and fusion._drawn(3, 2).shape == (3, 2)


# ---- attention


class KeywordAttention(LlamaAttention):
    """Whose forward has a default that only its name reaches, and one that stands in a row."""

    def forward(self, hidden_states: Tensor, position_embeddings: Any = None, *, times: float = 2.0) -> Any:
        B, T, _ = hidden_states.shape
        q, k, v = (
            layer(hidden_states).view(B, T, -1, 8).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        if position_embeddings is not None:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        found = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)(self, q, k, v, None)
        return found[0] * times, found[1]


ALL_ATTENTION_FUNCTIONS = LlamaAttention.forward.__globals__[fusion.INTERFACES]


def interleaved(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embeddings of pairs that lie side by side, as some models have them."""
    return q * cos[:, None] + q.flip(-1) * sin[:, None], k * cos[:, None] + k.flip(-1) * sin[:, None]


class InterleavedAttention(LlamaAttention):
    forward = types.FunctionType(
        LlamaAttention.forward.__code__,
        {**LlamaAttention.forward.__globals__, fusion.ROTARY: interleaved},
        "forward",
        LlamaAttention.forward.__defaults__,
    )


class OtherAttention(LlamaAttention):
    def forward(self, x: Tensor) -> Tensor:
        return apply_rotary_pos_emb(x, x, x[0], x[0])[0]


class CallableAttention(LlamaAttention):
    class Forward:
        def __call__(self, x: Tensor) -> Tensor:
            return x

    forward = Forward()


@pytest.mark.parametrize(
    ("kind", "window", "expected"),
    [
        (LlamaAttention, None, True),
        (LlamaAttention, 4, False),
        (KeywordAttention, None, True),
        (InterleavedAttention, None, False),
        (OtherAttention, None, False),
        (CallableAttention, None, False),
    ],
)
def test_which_attentions_are_fused(kind: Any, window: int | None, expected: bool) -> None:
    module = kind(CONFIG, 0)
    module.sliding_window = window
    assert is_swapped(module) is expected


@pytest.mark.parametrize("kind", [LlamaAttention, KeywordAttention])
def test_an_attention_is_the_modules_own_forward(kind: Any, ran: list[str]) -> None:
    module, plain = kind(CONFIG, 0), kind(CONFIG, 0)
    plain.load_state_dict(module.state_dict())
    assert is_swapped(module)
    x, angles = torch.randn(2, 5, 32), (torch.randn(1, 5, 8), torch.randn(1, 5, 8))
    found, expected = (one(x, angles) for one in (module, plain))
    torch.testing.assert_close(found[0], expected[0])
    assert ran == ["rotary", "attention"] and found[1] is None
    assert seen(module) == (10, 320, torch.float32, torch.device("cpu"), None)
    if kind is KeywordAttention:
        for given in ({"times": 3.0}, {"position_embeddings": None}):
            torch.testing.assert_close(module(x, **given)[0], plain(x, **given)[0])


_drawn = torch.Generator().manual_seed(0)
Q, K, COS = (torch.randn(shape, generator=_drawn) for shape in ((2, 4, 5, 8), (2, 2, 5, 8), (2, 5, 8)))


@pytest.mark.parametrize(
    ("given", "options"),
    [
        ((Q, K, COS, COS, 1), {}),
        ((Q, K, COS, COS), {"unsqueeze_dim": 1}),
        ((Q[0], K[0], COS, COS), {}),
        ((Q, K, COS[0], COS), {}),
        ((Q, K, COS[..., :4], COS[..., :4]), {}),
        ((Q, K.double(), COS, COS), {}),
        ((Q, K.to("meta"), COS, COS), {}),
        ((Q, K, COS.clone().requires_grad_(), COS), {}),
        ((Q, K, COS, COS.clone().requires_grad_()), {}),
    ],
)
def test_what_is_turned_otherwise_is_turned_by_the_models_own(given: Any, options: Any, ran: list[str]) -> None:
    asked: list[Any] = []
    turn = fusion._Rotary(lambda *args, **more: asked.append((args, more)) or "own")
    assert turn(*given, **options) == "own" and not ran
    [(args, more)] = asked
    assert all(one is other for one, other in zip(args, given, strict=True)) and more == options


def test_what_is_turned_as_usual_is_turned_by_the_operator(ran: list[str]) -> None:
    turn = fusion._Rotary(lambda *_: "own")
    for given in ((Q, K, COS, COS), (Q, K, COS[:1], COS[:1])):
        for found, expected in zip(turn(*given), apply_rotary_pos_emb(*given), strict=True):
            torch.testing.assert_close(found, expected)
    assert ran == ["rotary"] * 2


def test_only_torchs_attention_is_ours() -> None:
    own = ALL_ATTENTION_FUNCTIONS
    table = fusion._Interfaces(own, fusion.attend)
    assert table.get_interface("sdpa", None) is fusion.attend
    assert table.get_interface("eager", sdpa_attention_forward) is fusion.attend
    assert table.get_interface("eager", print) is print


class Causal(nn.Module):
    is_causal, num_key_value_groups = True, 2


class Bidirectional(nn.Module):
    is_causal, num_key_value_groups = False, 2


class Silent(nn.Module):
    num_key_value_groups = 2


@pytest.mark.parametrize("kind", [Causal, Bidirectional, Silent])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": None, "scaling": None, "dropout": 0.0},
        {"is_causal": True, "scaling": 0.7, "position_ids": torch.arange(5), "use_cache": True},
        {"is_causal": False, "scaling": 0.0, "softcap": None, "output_router_logits": False},
    ],
)
def test_attention_is_torchs(kind: Any, options: dict[str, Any], ran: list[str]) -> None:
    found, none = fusion.attend(kind(), Q, K, -K, None, **options)
    assert none is None and ran == ["attention"]
    torch.testing.assert_close(found, sdpa_attention_forward(kind(), Q, K, -K, None, **options)[0])


def test_attention_of_few() -> None:
    """One token, and none, which torch's does not take."""
    q = torch.randn(1, 4, 1, 8)
    torch.testing.assert_close(
        fusion.attend(Causal(), q, q, q, None)[0], sdpa_attention_forward(Causal(), q, q, q, None)[0]
    )
    for B, T in ((0, 5), (2, 0)):
        q = torch.randn(B, 4, T, 8)
        assert fusion.attend(Causal(), q, q, q, None)[0].shape == (B, T, 4, 8)


@pytest.mark.parametrize("trained", [(), (0,), (1,), (2,)], ids=str)
@pytest.mark.parametrize("grad", [True, False])
def test_whatever_is_trained_has_its_gradient(trained: tuple[int, ...], grad: bool) -> None:
    given = [one.clone().requires_grad_(i in trained) for i, one in enumerate((Q, K, -K))]
    with torch.set_grad_enabled(grad):
        out = fusion.attend(Causal(), *given, None)[0]
    assert out.requires_grad is (grad and bool(trained))
    if out.requires_grad:
        expected = sdpa_attention_forward(Causal(), *given, None)[0]
        grads = (torch.autograd.grad(one.square().sum(), given[trained[0]])[0] for one in (out, expected))
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


def test_rows_without_padding_see_themselves_alone() -> None:
    q, k, starts = (torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.tensor([0, 4, 9], dtype=torch.int32))
    nan = torch.full((1, 1, 1, 1), torch.nan)
    found, _ = fusion.attend(Causal(), q, k, -k, nan, cu_seq_lens_q=starts, cu_seq_lens_k=starts, max_length_q=5)
    for part in (slice(0, 4), slice(4, 9)):
        rows = (one[:, :, part] for one in (q, k, -k))
        torch.testing.assert_close(found[:, part], sdpa_attention_forward(Causal(), *rows, None)[0])
    with pytest.raises(ValueError, match="^cu_seq_lens_q: .*attention has dropout"):
        fusion.attend(Causal(), q, k, -k, nan, cu_seq_lens_q=starts, dropout=0.1)


MASK = torch.zeros(2, 1, 5, 5)


@pytest.mark.parametrize(
    ("given", "options", "obstacle"),
    [
        ((Q, K, K, MASK), {}, "there is a mask"),
        ((Q, K, K, None), {"dropout": 1e-9}, "attention has dropout"),
        ((Q, K, K, None), {"cache": 0, "use_cache": True, "position_bias": MASK}, "it is given cache, position_bias"),
        ((Q, K[:, :, :3], K[:, :, :3], None), {}, "there are other keys than queries"),
        ((Q, K, K[..., :6], None), {}, "there are other keys than queries"),
        ((Q, K[:1], K[:1], None), {}, "there are other keys than queries"),
        ((Q.to("meta"), K.to("meta"), K.to("meta"), None), {}, "torch has its own on meta devices"),
    ],
)
def test_attention_that_the_operator_has_not_is_torchs(
    given: Any, options: dict[str, Any], obstacle: str, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(fusion, "sdpa_attention_forward", lambda *args, **more: asked.append((args, more)) or "torchs")
    module = Causal()
    assert fusion.attend(module, *given, **options) == "torchs" and not ran
    [(args, more)] = asked
    assert all(one is other for one, other in zip(args, (module, *given), strict=True)) and more == options
    assert seen(module).obstacle == obstacle


def test_queries_and_values_of_other_dtypes_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "sdpa_attention_forward", lambda *_: "torchs")
    module = Causal()
    assert fusion.attend(module, Q, K, K.double(), None) == "torchs"
    assert "float64" in str(seen(module).obstacle)


def test_what_is_traced_is_the_modules_own(ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves no note, which a compiler would trace, too."""
    parts = [LlamaRMSNorm(32).requires_grad_(False), LlamaMLP(CONFIG), LlamaAttention(CONFIG, 0)]
    x, angles = torch.randn(2, 5, 32), (COS, COS)
    expected = [parts[0](x), parts[1](x), parts[2](x, angles)[0]]
    fusion.attach(nn.ModuleList(parts))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = [parts[0](x), parts[1](x), parts[2](x, angles)[0]]
    assert all(map(torch.equal, found, expected)) and not ran
    assert not any(fusion.SEEN in part.__dict__ for part in parts)


# ---- a model of parts


@pytest.fixture
def model() -> Iterator[nn.ModuleDict]:
    torch.manual_seed(0)
    parts = {"one": LlamaRMSNorm(32), "other": LlamaRMSNorm(32), "mlp": LlamaMLP(CONFIG)}
    built = nn.ModuleDict({**parts, "attention": LlamaAttention(CONFIG, 0), "plain": AddsOneRMSNorm(32)})
    yield built.requires_grad_(False)


def test_nothing_is_told_of_a_model_without_fused_parts(model: nn.ModuleDict) -> None:
    assert fusion.describe(model) == [] and fusion.weights(model) == {}
    fusion.detach(model["one"])
    assert type(model["one"]) is LlamaRMSNorm


def test_what_is_measured_is_what_the_parts_call(model: nn.ModuleDict) -> None:
    fusion.attach(model)
    kinds = [type(part) for part in model.values()]
    fusion.attach(model)
    assert [type(part) for part in model.values()] == kinds
    found = fusion.weights(model)
    assert set(found) == {"rms_norm", "swiglu", "attention", "rotary"}
    assert [one is module.weight for one, module in zip(found["rms_norm"], (model["one"], model["other"]), strict=True)]
    assert [len(found[op]) for op in ("rms_norm", "swiglu", "attention", "rotary")] == [2, 1, 1, 1]


def test_what_is_told(model: nn.ModuleDict, monkeypatch: pytest.MonkeyPatch) -> None:
    fusion.attach(model)
    x = torch.randn(2, 5, 32)
    model["one"](x)
    model["mlp"](x)
    model["attention"](x, (COS, COS), MASK)
    own = "transformers"
    told = {
        "1 x LlamaRMSNorm": (own, "not called yet, unless compiled"),
        "1 x AddsOneRMSNorm": (own, "its own forward: it computes something else than rms_norm"),
        "1 x LlamaAttention": (own, "its own forward: there is a mask"),
    }
    chosen = ops.choose("rms_norm", x, 10, 320, dropout=False)
    lines = fusion.describe(model)
    assert lines[0] == ("1 x LlamaRMSNorm", chosen.implementation, f"rms_norm, 10 rows: {chosen.reason}")
    assert {name: tuple(rest) for name, *rest in lines[1:]}.items() >= told.items()
    model["other"](x)
    assert fusion.describe(model)[0][0] == "2 x LlamaRMSNorm"
    monkeypatch.setattr(ops, "forced", "triton")
    name, implementation, reason = fusion.describe(model)[0]
    assert (name, implementation) == ("2 x LlamaRMSNorm", "triton") and reason.startswith("cannot run: FASTLORA_IMPL")


def test_the_measured_class_of_a_call_is_told(model: nn.ModuleDict, monkeypatch: pytest.MonkeyPatch) -> None:
    fusion.attach(model)
    model["one"](torch.randn(3, 32))
    asked: list[Any] = []
    monkeypatch.setattr(ops, "choose", lambda *args, **more: asked.append((args, more)) or ops.Choice("cpu", "so"))
    fusion.describe(model)
    [((op, like, rows, elements), more)] = asked
    assert (op, rows, elements, more) == ("rms_norm", 3, 96, {"dropout": False})
    assert (like.dtype, like.device.type) == (torch.float32, "cpu")


def test_detach_leaves_what_others_have_derived(model: nn.ModuleDict) -> None:
    fusion.attach(model)
    model["one"](torch.randn(3, 32))
    linear = nn.Linear(2, 3)
    linear.__class__ = derived = swap.derive(nn.Linear, lambda plain: derived)
    linear.__dict__[fusion.SEEN] = "another's"
    for module in (*model.values(), linear):
        fusion.detach(module)
    assert not any(map(swap.is_derived, model.values())) and fusion.SEEN not in model["one"].__dict__
    assert swap.is_derived(linear) and fusion.SEEN in linear.__dict__
