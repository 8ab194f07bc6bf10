"""The bar says loss, speed, part of the machine, memory and time left; the products behind it are those that torch counts."""

from dataclasses import replace

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from training import a_base, a_config, on_cpu, one_thread, some_data  # noqa: F401  (fixtures)

from fastlora import limits, progress
from fastlora.choice.clock import HostClock
from fastlora.limits import Products
from fastlora.models import load_base
from fastlora.train import train

CPU = torch.device("cpu")


def counted(model, T: int) -> int:
    """FLOPs of forward and backward of one row whose tokens all count, as torch counts them."""
    ids = torch.arange(T)[None] % 40
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("trains", ["all", "adapters"])
def test_products_are_those_that_torch_counts(trains):
    """Attention apart, of which torch counts both halves or, fused, nothing; and the lowest layer's input has no gradient."""
    torch.manual_seed(0)
    model = tiny.llama(tie_word_embeddings=False, num_hidden_layers=6).train()
    if trains == "adapters":
        model = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4))
    T = 16
    ours = Products(model)
    expected = counted(model, T)
    without = ours.flops([T], T) - ours.pair * T * T / 2
    assert 0.9 * expected <= without <= 1.1 * expected + 2 * ours.pair * T * T


def test_products_grow_with_tokens_labels_and_the_square_of_a_row():
    ours = Products(tiny.llama(tie_word_embeddings=False))
    body = sum(p.numel() for name, p in tiny.llama().named_parameters() if p.dim() == 2 and "embed" not in name)
    assert ours.token == 6 * body and ours.label == 6 * 40 * 32 and ours.pair == 12 * 32 * 2
    assert ours.flops([3, 5], 2) == 8 * ours.token + 2 * ours.label + ours.pair * (9 + 25) / 2
    frozen = tiny.llama().requires_grad_(False)
    assert Products(frozen).token == 4 * body and Products(frozen).label == 4 * 40 * 32


def test_what_sizes_do_not_tell_is_left_out(config, base):
    from moe_models import moe_model

    assert not Products.known(tiny.t5()) and Products.known(tiny.llama()) and not Products.known(moe_model())
    model = load_base(str(base), torch.float32, CPU)
    assert progress.Limit.of(model, replace(config, share_prefix=True), CPU, torch.float32) is None
    assert progress.Limit.of(model, config, torch.device("meta"), torch.float32) is None


def test_a_product_that_the_machine_has_not_is_left_out(config, base, monkeypatch):
    def refuse(*_):
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(progress, "fastest_product", refuse)
    assert progress.Limit.of(load_base(str(base), torch.float32, CPU), config, CPU, torch.float16) is None


def test_products_of_16_bits_that_are_slower_than_float32s_are_no_limit(config, base, monkeypatch):
    rates = {torch.float32: 3e9, torch.float16: 1e9, torch.bfloat16: 5e9}
    monkeypatch.setattr(progress, "fastest_product", lambda device, dtype, *_: rates[dtype])
    model = load_base(str(base), torch.float32, CPU)
    found = [progress.Limit.of(model, config, CPU, dtype).rate for dtype in rates]
    assert found == [3e9, 3e9, 5e9]


def test_the_rate_is_measured_without_a_draw_from_any_generator():
    before = torch.get_rng_state()
    rate = limits.fastest_product(CPU, torch.float32, HostClock(CPU), 0.01, 64)
    assert rate > 1e6 and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("library", [True, False])
def test_a_dtype_without_a_library_is_measured_by_way_of_float32(monkeypatch, library):
    monkeypatch.setattr(limits.packed, "has_library", lambda dtype: library)
    monkeypatch.setattr(limits.packed, "suits_onednn", lambda dtype: False)
    seen = set()
    monkeypatch.setattr(limits.torch, "mm", lambda x, w, out: seen.update((x.dtype, w.dtype, out.dtype)))
    monkeypatch.setattr(limits, "packs", lambda dtype, device: False)
    limits.fastest_product(CPU, torch.bfloat16, HostClock(CPU), 0.01, 8)
    assert seen == {torch.bfloat16 if library else torch.float32}


def test_percent_is_of_one_process_among_those_that_are_alike():
    from fastlora.data.rows import Row

    limit = progress.Limit(Products(tiny.llama()), rate=1e9)
    rows = [Row([1, 2, 3], [-100, 2, 3])]
    flops = limit.products.flops([3], 2)
    assert limit.percent(rows, 2.0, 1) == pytest.approx(100 * flops / 2e9)
    assert limit.percent(rows, 2.0, 4) == pytest.approx(100 * flops / 8e9)


def test_what_comes_before_the_first_step_is_told_and_is_no_steps_time(capsys):
    now = [0.0]
    bar = progress.Bar(4, 0, True, CPU, 1)
    bar.tqdm._time = lambda: now[0]
    bar.tqdm.start_t = bar.tqdm.last_print_t = 0.0
    with bar.aside("measuring"):
        now[0] = 100.0
        assert bar.tqdm.postfix == "measuring"
    assert bar.tqdm.start_t == 100.0 and not bar.tqdm.postfix
    bar.tqdm.close()
    assert "0/4" in capsys.readouterr().err
    with progress.Bar(4, 0, False, CPU, 1) as quiet, quiet.aside("measuring"):
        pass
    assert not capsys.readouterr().err


def test_the_bar_says_it_all_and_changes_no_bit(config, capsys, tmp_path):
    train(replace(config, max_steps=3))
    line = capsys.readouterr().err.splitlines()[-1]
    for part in ("3/3", "loss ", "tokens/s", "% of the machine", " GB", "<00:00"):
        assert part in line, part
    quiet = replace(config, max_steps=3, output=tmp_path / "quiet")
    train(quiet, progress=False)
    weights = [path / "adapter_model.safetensors" for path in (config.output, quiet.output)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert "loss" not in capsys.readouterr().err
