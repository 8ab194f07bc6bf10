"""DoRA over quantised bases (QDoRA): PEFT's results, gradients and files, by the fused layers."""

import copy

import pytest
import torch
from peft_models import IDS, assert_as_near_as
from quantised_models import EACH_KIND, NATIVE, NEEDS_BITSANDBYTES, a_folder, load, never_packed, run, unquantised  # noqa: F401
from test_quantised_models import assert_all_fused, assert_merges_alike, run_forward

import fastlora

pytestmark = NATIVE


def dora(folder: str, kind: str, dtype: torch.dtype = torch.float32, **options):
    """With magnitudes that are not the norms: as after some training."""
    model = load(folder, kind, dtype, use_dora=True, **options)
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data *= 0.5 + torch.rand_like(parameter)
    return model


@EACH_KIND
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_is_within_the_bound(folder: str, kind: str, dtype: torch.dtype) -> None:
    exact, eager = (run(make(dora(folder, kind, dtype))) for make in (unquantised, lambda model: model))
    # Of another model: PEFT's own forward over int8 spoils the weight for the next one.
    model = fastlora.accelerate(dora(folder, kind, dtype))
    ours = run(model)
    assert sum("lora_magnitude_vector" in name for name in ours) == 14
    assert_as_near_as(ours, eager, exact)
    assert_all_fused(model)


@EACH_KIND
def test_dropout_is_pefts_own(folder: str, kind: str) -> None:
    eager = run(dora(folder, kind, lora_dropout=0.25))
    model = fastlora.accelerate(dora(folder, kind, lora_dropout=0.25))
    ours = run(model)
    for name in eager:
        assert (ours[name] - eager[name]).abs().max() <= 2e-3 * eager[name].abs().max(), name
    assert_all_fused(model)


@EACH_KIND
def test_answers_token_by_token(folder: str, kind: str) -> None:
    given = {"input_ids": IDS, "max_new_tokens": 4 if kind != "int8" else 1, "do_sample": False, "output_logits": True}
    given |= {"return_dict_in_generate": True, "pad_token_id": 0}
    expected = torch.stack(never_packed(dora(folder, kind)).eval().generate(**given).logits)
    model = fastlora.accelerate(dora(folder, kind).eval())
    ours = torch.stack(model.generate(**given).logits)
    assert (ours - expected).abs().max() <= (1e-4 if kind != "int8" else 5e-2) * expected.abs().max()
    assert_all_fused(model)


@NEEDS_BITSANDBYTES
def test_after_pefts_own_forward_over_int8(folder: str) -> None:
    """Which leaves the weight without its factors, and raises if it comes again."""
    model, peer = dora(folder, "int8"), fastlora.accelerate(dora(folder, "int8"))
    run(model)
    with pytest.raises(AttributeError):
        run(copy.deepcopy(model))
    fastlora.accelerate(model)
    for training in (True, False):
        mine, its = (run_forward(one.train(training)) for one in (model, peer))
        assert torch.equal(mine, its)
    assert_all_fused(model)


@NEEDS_BITSANDBYTES
def test_merging_is_pefts_and_is_seen(folder: str) -> None:
    assert_merges_alike(fastlora.accelerate(dora(folder, "nf4")), dora(folder, "nf4"))
