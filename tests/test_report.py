"""report: the truth about what ran, what is a guess, and what was before."""

import peft
import pytest
import torch
from measurements import needs_native
from peft_models import a_pair, logits, peft_model, q_proj, reason_of  # noqa: F401  (a fixture)

import fastlora
from fastlora import ops, reference
from fastlora.choice import table


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.merge_adapter(), "PEFT's own forward: the adapter is merged"),
        (lambda m: m.base_model.disable_adapter_layers(), "PEFT's own forward: adapters are disabled"),
    ],
    ids=["merged", "disabled"],
)
def test_report_tells_a_call_that_was_not_fused(change, reason):
    model, _ = peft_model()
    change(fastlora.accelerate(model))
    logits(model)
    assert reason_of(model) == ("reference", reason)


def test_report_says_what_is_a_guess():
    model, _ = peft_model()
    fastlora.accelerate(model, frozen=True)
    for part in ("layers.0.self_attn.q_proj", "lm_head"):
        assert reason_of(model, part)[1].startswith("not called yet, unless compiled; 512 rows: ")
    logits(model)
    for part in ("layers.0.self_attn.q_proj", "lm_head"):
        assert reason_of(model, part)[1].startswith("33 rows: ")
    model, _ = peft_model()
    fastlora.accelerate(model).merge_adapter()
    reason = "PEFT's own forward: the adapter is merged"
    assert reason_of(model) == ("reference", f"not called yet, unless compiled; {reason}")
    model.compile(backend="eager")
    assert reason_of(model) == ("reference", f"compiled: not observed; {reason}")


@pytest.mark.parametrize("how", ["wrapped", "a block"])
def test_report_does_not_claim_to_have_seen_compiled_calls(how):
    model, _ = peft_model()
    fastlora.accelerate(model, frozen=True)
    whole = torch.compile(model, backend="eager") if how == "wrapped" else model
    if how == "a block":
        model.base_model.model.model.layers[0].compile(backend="eager")
    alone = "not grouped with k_proj, v_proj where compiled"

    def reason(part="layers.0.self_attn.q_proj"):
        return reason_of(whole, part)[1]

    for _ in range(2):
        assert reason().startswith("compiled: not observed; a guess, 512 rows: ") and alone in reason()
        logits(whole)
    if how == "wrapped":  # from within nobody sees that
        assert reason_of(model)[1].startswith("not called yet, unless compiled; 512 rows: ")
    with torch.compiler.set_stance("force_eager"):
        logits(whole)
    assert reason().startswith("compiled: not observed; its last eager call, 33 rows: ")
    for module in model.modules():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            module.enable_adapters(False)
    with torch.compiler.set_stance("force_eager"):
        logits(whole)
    assert reason().startswith(
        "compiled: not observed; in its last eager call PEFT's own forward: adapters are disabled"
    )
    assert reason_of(model, "layers.1.self_attn.q_proj")[1].startswith("PEFT's own forward: adapters are disabled")


def test_report_tells_what_changed_since_and_what_was_before():
    """A step of DPO ends with the reference's logits, adapters disabled; what trained was fused all the same."""
    model, _ = peft_model()
    fastlora.accelerate(model)
    with model.disable_adapter():
        logits(model)
        assert reason_of(model) == ("reference", "PEFT's own forward: adapters are disabled")
    assert reason_of(model) == ("reference", "PEFT's own forward: adapters are disabled, now no longer")
    logits(model)
    implementation, reason = reason_of(model)
    assert implementation in ops.IMPLEMENTATIONS and reason.startswith("33 rows: ")
    assert reason.endswith("; earlier also PEFT's own forward: adapters are disabled")
    with model.disable_adapter():
        logits(model)
    implementation, reason = reason_of(model)
    assert implementation == "reference"
    assert (
        reason.startswith("PEFT's own forward: adapters are disabled, now no longer; before, ")
        and "33 rows: " in reason
    )
    logits(model)
    model.merge_adapter()
    assert reason_of(model)[1].endswith("; from now on PEFT's own forward: the adapter is merged")
    q_proj(model).unmerge()
    q_proj(model)(torch.randn(3, 32), alora_offsets=[None] * 3)
    assert reason_of(model)[1].startswith("PEFT's own forward: the call has arguments besides x; before, ")


def test_report_leaves_a_call_that_failed_out():
    model, _ = peft_model()
    layer = q_proj(fastlora.accelerate(model, frozen=True))
    logits(model)
    before = fastlora.report(model)
    for wrong in (torch.randn(3, 31), torch.randn(3, 32, dtype=torch.float64)):
        for module in (layer, model.base_model.model.lm_head):
            with pytest.raises((ValueError, RuntimeError)):
                module(wrong)
    with model.disable_adapter(), pytest.raises(RuntimeError):
        layer(torch.randn(3, 31))
    assert fastlora.report(model) == before


@needs_native
def test_report_tells_whether_dropout_was_on_and_what_did_not_run(monkeypatch):
    """An implementation that is slower is told as not run, and looked up as with dropout where the call had some."""
    monkeypatch.setattr(ops, "forced", None)
    known = [
        table.Measurement(
            op, "float32", 64, "small", dropout, "cpu", True, 2.0 if dropout else 0.5, "measured by a test"
        )
        for op in ("lora_linear", "lora_linear_backward")
        for dropout in (False, True)
    ]
    table.load_state({"cpu": known})
    model, _ = peft_model(target_modules=["o_proj"], lora_dropout=0.25)
    fastlora.accelerate(model).train()
    o_proj, slower = (
        "layers.0.self_attn.o_proj",
        "plain PyTorch, since native C++ would take 2.00x of its time (measured by",
    )
    assert reason_of(model, o_proj)[0] == "reference"  # a guess
    logits(model)
    assert reason_of(model, o_proj) == ("reference", f"33 rows: {slower} a test)")
    logits(model.eval())
    assert reason_of(model, o_proj)[0] == "cpu"
    assert reason_of(model, o_proj)[1].startswith(
        "33 rows: native C++, 0.50x of plain PyTorch's time (measured by a test)"
    )


@needs_native
def test_report_tells_a_forced_implementation_that_cannot_run(monkeypatch):
    model, _ = peft_model(dtype=torch.float64)
    fastlora.accelerate(model)
    monkeypatch.setattr(ops, "forced", "cpu")
    with pytest.raises(ops.ImplementationError, match="float64"):
        logits(model)
    reason = "not called yet, unless compiled; cannot run: FASTLORA_IMPL=cpu: lora_linear cannot run: cpu does not compute in float64"
    assert reason_of(model, "layers.0.self_attn.o_proj") == ("cpu", reason)


def test_report_tells_a_forced_implementation_without_a_backward(pair, monkeypatch):
    model, _ = pair
    native = {(case, "cpu"): reference.lora_linear for case in ("multi_lora", "lora_linear")}
    others = {key: value for key, value in ops.implementations.items() if key[1] != "cpu"}
    monkeypatch.setattr(ops, "implementations", others | native)
    monkeypatch.setattr(ops, "_missing", {})
    monkeypatch.setattr(ops, "forced", "cpu")
    logits(model, adapter_names=["other", "__base__", "default"])
    implementation, reason = reason_of(model)
    assert implementation == "cpu"
    assert "no backward: FASTLORA_IMPL=cpu: multi_lora_backward cannot run: cpu has no multi_lora_backward" in reason


def test_report_prints_a_table():
    model, _ = peft_model()
    lines = str(fastlora.report(fastlora.accelerate(model))).splitlines()
    assert lines[0].split() == ["name", "implementation", "reason"] and len(lines) == 15
    entry = fastlora.report(model)[0]
    assert entry._fields == ("name", "implementation", "reason") and entry.name in lines[1] and entry.reason in lines[1]
