"""Several adapters made into one: PEFT's combinations, told how far they are from the weighted sum; and no folder is lost."""

import inspect
import json
import re
import shutil
import typing

import pytest
import tiny
import torch
from adapter_folders import change, save
from peft import LoraConfig, LoraModel, PeftModel

import fastlora.combine
from fastlora import adapters
from fastlora.adapters import AdapterError
from fastlora.combine import PRUNED, SUMS, combine
from fastlora.config import CombinationType
from fastlora.merge import MergeError
from fastlora.models import load_model

WEIGHTS = [0.5, -0.25]


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    with tiny.on_cpu():
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_model(tmp_path_factory.mktemp("combine") / "model")


@pytest.fixture
def pair(base, tmp_path):
    """Two adapters of rank 4, on layers that overlap."""
    make = lambda: load_model(str(base))[0]  # noqa: E731
    torch.manual_seed(1)
    return [
        save(tmp_path / "one", make, target_modules=["q_proj", "v_proj"], lora_alpha=6),
        save(tmp_path / "two", make, target_modules=["q_proj", "down_proj"], lora_alpha=2),
    ]


def updates(base, folder):
    """s B A of each layer, by PEFT's own loading."""
    model = PeftModel.from_pretrained(load_model(str(base))[0], folder)
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").double()
        for name, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def wanted(base, folders, weights=WEIGHTS):
    total = {}
    for folder, weight in zip(folders, weights, strict=True):
        for name, update in updates(base, folder).items():
            total[name] = total.get(name, 0.0) + weight * update
    return total


def error(got, expected):
    assert got.keys() == expected.keys()
    lost = sum((got[name] - expected[name]).square().sum() for name in expected)
    return (lost / sum(one.square().sum() for one in expected.values())).sqrt().item()


def cosines(base, folders, merged):
    """Of the merged update with each adapter's, on whole matrices, zeros in the layers that one of them has not."""
    whole = updates(base, merged)

    def flat(found):
        return torch.cat([found.get(name, torch.zeros_like(whole[name])).flatten().double() for name in sorted(whole)])

    assert all(updates(base, one).keys() <= whole.keys() for one in folders)
    return [
        torch.nn.functional.cosine_similarity(flat(whole), flat(updates(base, one)), dim=0).item() for one in folders
    ]


def test_every_name_of_pefts_is_taken():
    theirs = inspect.signature(LoraModel.add_weighted_adapter).parameters["combination_type"].annotation
    names = set(re.findall(r"'(\w+)'", str(theirs)))
    assert {*SUMS, *PRUNED} == set(typing.get_args(CombinationType)) == names


@pytest.mark.parametrize("combination_type", SUMS)
def test_the_error_is_that_of_what_is_read_back(combination_type, base, pair, tmp_path):
    out = tmp_path / "out"
    report = combine(None, pair, out, weights=WEIGHTS, combination_type=combination_type)
    expected = wanted(base, pair)
    assert report.sum_relative_error == pytest.approx(error(updates(base, out), expected), rel=1e-3, abs=1e-6)
    assert report.layer_errors.keys() == expected.keys() and report.layers == 6 and report.adapters == 2
    assert max(report.layer_errors.values()) == report.largest_layer_error
    assert report.distance_from_sum is None and report.cosines == pytest.approx(cosines(base, pair, out), rel=1e-4)
    if combination_type == "cat":
        assert report.sum_relative_error < 1e-6 and report.r == 8
    else:
        assert 0.01 < report.sum_relative_error and report.r == 4
    assert adapters.read(out).base == str(base)


def test_an_svd_of_enough_ranks_is_the_sum(base, pair, tmp_path):
    report = combine(None, pair, tmp_path / "out", weights=WEIGHTS, combination_type="svd", svd_rank=8)
    assert report.sum_relative_error < 1e-5 and report.r == 8


@pytest.mark.parametrize("combination_type", PRUNED)
def test_what_leaves_values_out_wants_no_sum_and_is_the_same_each_time(combination_type, base, pair, tmp_path):
    reports = [
        combine(None, pair, tmp_path / name, weights=WEIGHTS, combination_type=combination_type, density=0.5)
        for name in ("a", "b")
    ]
    assert all(one.sum_relative_error is None and one.layer_errors == {} for one in reports)
    distance = error(updates(base, tmp_path / "a"), wanted(base, pair))
    assert reports[0].distance_from_sum == pytest.approx(distance, rel=1e-4) and distance > 0.01
    assert reports[0].cosines == pytest.approx(cosines(base, pair, tmp_path / "a"), rel=1e-4)
    one, other = (adapters.read(tmp_path / name).tensors for name in ("a", "b"))
    assert all(torch.equal(one[key], other[key]) for key in one) and one.keys() == other.keys()
    load_model(str(base), {"default": tmp_path / "a"})


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "use_rslora": True},
        {"target_modules": r".*\.layers\.1\..*v_proj"},
        {"target_modules": ["v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"q_proj": 3}},
        {"target_modules": ["q_proj", "embed_tokens"], "r": 3},
    ],
    ids=["rank-stabilised", "a pattern", "some layers", "ragged ranks", "an embedding"],
)
@pytest.mark.parametrize("combination_type", ["cat", "svd"])
@pytest.mark.filterwarnings("ignore")
def test_whatever_the_configs_say_the_sum_is_of_all_layers(combination_type, options, base, pair, tmp_path):
    """PEFT alone scales a rank-stabilised result once more, and takes the first adapter's choice of layers for all."""
    odd = save(tmp_path / "odd", lambda: load_model(str(base))[0], **options)
    svd_rank = 32 if combination_type == "svd" else None
    for number, folders in enumerate(([odd, pair[0]], [pair[1], odd])):
        out = tmp_path / str(number)
        report = combine(None, folders, out, weights=WEIGHTS, combination_type=combination_type, svd_rank=svd_rank)
        assert report.sum_relative_error < 1e-5
        assert error(updates(base, out), wanted(base, folders)) < 1e-5


def test_linear_of_ragged_ranks_is_saved_with_the_ranks_it_has(base, tmp_path):
    folders = [
        save(
            tmp_path / name,
            lambda: load_model(str(base))[0],
            target_modules=["q_proj", "o_proj"],
            rank_pattern={"o_proj": 2},
        )
        for name in ("one", "two")
    ]
    report = combine(None, folders, tmp_path / "out", weights=[1, 1], combination_type="linear")
    assert report.sum_relative_error == pytest.approx(
        error(updates(base, tmp_path / "out"), wanted(base, folders, [1, 1])), rel=1e-3
    )


def test_an_adapter_alone_with_weight_one_is_itself(base, pair, tmp_path):
    report = combine(None, [pair[0], pair[1]], tmp_path / "out", weights=[1.0, 0.0], combination_type="cat")
    got, one = updates(base, tmp_path / "out"), updates(base, pair[0])
    assert report.sum_relative_error < 1e-6
    assert all(torch.allclose(got[name], one[name], atol=1e-6) for name in one)


BAD = {
    "one adapter": ({"folders": 1, "weights": [1.0]}, "combination_type=cat: got 1 adapter, expected two or more"),
    "a weight too few": ({"weights": [1.0]}, r"weights=\[1.0\]: expected 2 numbers"),
    "no number": ({"weights": [1.0, float("nan")]}, "weights=.*: expected 2 numbers"),
    "another name": ({"combination_type": "sum"}, "combination_type='sum': expected one of linear, cat, svd"),
    "a density too much": ({"density": 0.5}, "density=0.5: expected none with combination_type=cat"),
    "no density": ({"combination_type": "ties"}, "density=None: expected a share above 0, at most 1"),
    "a density of 2": ({"combination_type": "ties", "density": 2.0}, "density=2.0: expected a share"),
    "a rank too much": ({"svd_rank": 4}, "svd_rank=4: expected none with combination_type=cat"),
    "a rank of 0": ({"combination_type": "svd", "svd_rank": 0}, "svd_rank=0: expected a rank of at least 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_options_are_named(name, pair, tmp_path):
    given, message = BAD[name]
    options = {"weights": WEIGHTS, "combination_type": "cat", **given}
    folders = pair[: options.pop("folders", 2)]
    with pytest.raises(ValueError, match=message):
        combine(None, folders, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore")
def test_what_is_no_plain_lora_is_refused_before_anything_is_loaded(base, pair, tmp_path):
    for key, options in {
        "use_dora": {"use_dora": True},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "lora_bias": {"lora_bias": True},
        "bias": {"bias": "lora_only"},
        "trainable_token_indices": {"trainable_token_indices": [1]},
    }.items():
        odd = save(tmp_path / key, lambda: load_model(str(base))[0], target_modules=["q_proj"], **options)
        with pytest.raises(AdapterError, match=f"{key}: expected .* in an adapter that is combined"):
            combine("nowhere", [pair[0], odd], tmp_path / "out", weights=WEIGHTS, combination_type="cat")


def test_no_folder_is_lost(base, pair, tmp_path, monkeypatch):
    options = {"weights": WEIGHTS, "combination_type": "cat"}
    with pytest.raises(ValueError, match="expected a folder apart from adapter="):
        combine(None, pair, pair[1], **options, overwrite=True)
    out = tmp_path / "out"
    combine(None, pair, out, **options)
    first = (out / adapters.WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True replaces it"):
        combine(None, pair, out, **options)
    with monkeypatch.context() as patch, pytest.raises(MergeError, match="reads back as another adapter"):
        patch.setattr(fastlora.combine.torch, "equal", lambda *_: False)
        patch.setattr(adapters.torch, "equal", lambda *_: False)
        combine(None, pair, out, **options, overwrite=True)
    assert (out / adapters.WEIGHTS).read_bytes() == first
    with pytest.raises(ValueError, match="the combined adapter changes nothing"):
        combine(None, [pair[0], pair[0]], tmp_path / "none", weights=[1, -1], combination_type="cat")
    with pytest.raises(AdapterError):
        broken = shutil.copytree(pair[0], tmp_path / "broken")
        change(broken, r=3)
        combine(None, [pair[1], broken], tmp_path / "none", **options)
    assert not (tmp_path / "none").exists()
    assert json.loads((out / adapters.CONFIG).read_text())["r"] == 8
    assert LoraConfig.from_pretrained(out).lora_alpha == 8
