"""TrainConfig: every option is held to its type and range before anything is read or written, and the error names it."""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from fastlora.config import TrainConfig
from fastlora.optimisers import scheduler
from fastlora.schedules import SCHEDULES
from fastlora.typed import fits, shown


def make(**options: Any) -> TrainConfig:
    return TrainConfig(**{"model": "some/model", "data": "rows.jsonl", "output": "out", **options})


WRONG = {
    int: ["16", 2.5, True, [1], None],
    float: ["x", True, [1.0], {}],
    bool: [1, "yes"],
    str: [1, b"x"],
    list: [3, ["a"], (1,)],
    dict: ["a", ["a"], {"a": 1}, {1: "a"}],
}


@pytest.mark.parametrize("name", [field.name for field in fields(TrainConfig)])
def test_every_option_is_held_to_its_type(name):
    """From the annotations themselves: an option that is added later is checked, too."""
    hint = TrainConfig.__annotations__[name]
    choices = [get_args(one) for one in (hint, *get_args(hint)) if get_origin(one) is Literal]  # or None, it may be
    choice = choices[0][0] if choices else "a"
    right = {int: 1, float: 1.5, bool: True, str: choice, list: [1], dict: {"text": "a"}}
    kinds = [kind for kind in WRONG if fits(right[kind], hint)]
    assert kinds, f"{name} takes none of the types that this test knows"
    tried = [value for value in WRONG[kinds[0]] if not fits(value, hint)] + [object()]
    for value in tried:
        inside = " with .+" if list in kinds and isinstance(value, list) else ""
        with pytest.raises(TypeError, match=rf"^{name}=.*: expected .*, got {type(value).__name__}{inside}$"):
            make(**{name: value})


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("r", "16", "r='16': expected int, got str"),
        ("batch_size", 2.5, "batch_size=2.5: expected int, got float"),
        ("lora_alpha", "x", "lora_alpha='x': expected float, got str"),
        ("epochs", True, "epochs=True: expected float, got bool"),
        (
            "target_modules",
            ["q_proj", 3],
            r"target_modules=\['q_proj', 3\]: expected str or a list of str, got list with 3",
        ),
        ("max_steps", "all", "max_steps='all': expected int or None, got str"),
        ("data", 3, "data=3: expected str or Path or a list of str or None, got int"),
        ("columns", "prompt=a", "columns='prompt=a': expected dict or None, got str"),
    ],
)
def test_a_wrong_type_says_what_was_expected(option, value, message):
    with pytest.raises(TypeError, match=message):
        make(**{option: value})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("method", "vera"),
        ("r", 0),
        ("r", 2**16 + 1),  # no reader of adapters takes more
        ("r", 2**31),
        ("epochs", 0),
        ("epochs", math.nan),
        ("epochs", 10**5000),
        ("max_steps", -1),
        ("batch_size", 10**5000),
        ("max_length", 1),
        ("max_tokens", 0),
        ("truncation", "end"),
        ("train_on_turns", "first"),
        ("max_samples", 0),
        ("max_samples", 10**5000),
        ("columns", {"question": "a"}),
        ("columns", {}),
        ("streaming", True),
        ("data", []),
        ("data", ["a", ""]),
        ("lora_dropout", 1.0),
        ("lora_dropout", math.nan),
        ("warmup_ratio", 1),
        ("lr", math.nan),
        ("lr", -1),
        ("lora_alpha", 1e39),  # float32 ends before it
        ("lora_alpha", 10**400),
        ("lora_alpha", 10**5000),
        ("max_grad_norm", math.inf),
        ("adam_beta1", 1.0),
        ("adam_beta2", -0.1),
        ("adam_epsilon", 0.0),
        ("optim", "adam"),
        ("loraplus_lr_ratio", 0.0),
        ("loraplus_lr_embedding", math.nan),
        ("neftune_noise_alpha", -5.0),
        ("seed", -1),
        ("seed", 2**32),
        ("dtype", "float64"),
        ("save_steps", 0),
        ("pack_budget", -1),
        ("resume_from", 0),
        ("model", ""),
        ("output", ""),
        ("target_modules", []),
        ("target_modules", ""),
        ("target_modules", "(q_proj"),
    ],
    ids=lambda value: value if isinstance(value, str) else shown(value),  # pytest would write the numbers out
)
def test_an_option_out_of_range_is_named(option, value):
    with pytest.raises(ValueError, match=f"^{option}=") as caught:
        make(**{option: value})
    assert len(str(caught.value)) < 300 and "--" not in str(caught.value)


@pytest.mark.parametrize("name", ["method", "truncation", "train_on_turns", "dtype", "optim"])
def test_a_choice_lists_the_others_and_each_of_them_is_taken(name):
    choices = get_args(TrainConfig.__annotations__[name])
    with pytest.raises(ValueError, match=f"^{name}='none of them': expected {' or '.join(map(repr, choices))}$"):
        make(**{name: "none of them"})
    needed = {"tokens": {"token_indices": [1]}, "peft": {"peft_config": "c.json"}}
    assert [getattr(make(**{name: one}, **needed.get(one, {})), name) for one in choices] == [*choices]


def test_data_is_one_source_or_a_list_that_json_has():
    assert make(data=("a.jsonl", Path("b.csv"))).data == ["a.jsonl", "b.csv"]
    assert make(data=["a.jsonl"]).data == "a.jsonl" and make(data=Path("a.jsonl")).data == Path("a.jsonl")


def test_turns_are_not_chosen_where_all_counts():
    with pytest.raises(ValueError, match="completion_only_loss=False and train_on_turns='last' exclude each other"):
        make(completion_only_loss=False, train_on_turns="last")


def test_resume_from_implies_resume_and_excludes_overwrite():
    assert make(resume_from=3).resume
    with pytest.raises(ValueError, match="resume and overwrite exclude each other"):
        make(resume_from=3, overwrite=True)


def test_what_shares_runs_a_batch_as_one_line_already():
    assert make(share_prefix=True, max_tokens=99).max_tokens == 99
    with pytest.raises(ValueError, match="^packing and share_prefix exclude each other"):
        make(share_prefix=True, packing=True)


def test_full_training_takes_no_target_modules():
    with pytest.raises(ValueError, match=r"^target_modules=\['q_proj'\]: method=full trains the whole model"):
        make(method="full", target_modules=["q_proj"])


def test_a_quantised_base_is_of_one_kind_and_not_trained():
    assert [make(**{name: True}).bits for name in ("load_in_4bit", "load_in_8bit")] == [4, 8] and make().bits is None
    with pytest.raises(ValueError, match="^load_in_4bit and load_in_8bit exclude each other"):
        make(load_in_4bit=True, load_in_8bit=True)
    for name in ("load_in_4bit", "load_in_8bit"):
        with pytest.raises(ValueError, match=f"^{name}=True: method=full takes no quantised base"):
            make(method="full", **{name: True})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optim": "sgd", "adam_beta1": 0.8}, "adam_beta1=0.8: optim=sgd has none"),
        ({"optim": "adafactor", "adam_epsilon": 1e-6}, "adam_epsilon=1e-06: optim=adafactor has none"),
        ({"loraplus_lr_embedding": 1e-5}, "loraplus_lr_embedding=1e-05: expected loraplus_lr_ratio as well"),
        ({"method": "full", "loraplus_lr_ratio": 16.0}, "loraplus_lr_ratio=16.0: method=full trains the whole model"),
        ({"neftune_noise_alpha": 5.0, "share_prefix": True}, "neftune_noise_alpha: expected no share_prefix"),
    ],
)
def test_what_has_no_use_beside_another_option_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make(**options)


def test_a_path_is_a_model_too(tmp_path):
    (tmp_path / "there").mkdir()
    assert make(model=tmp_path / "there" / "..").model == str(tmp_path)


@pytest.mark.parametrize("name", [kind.value for kind in SchedulerType] + ["nonsense"])
def test_a_schedule_works_or_is_refused_with_those_that_do(name):
    """Also those that a later transformers may bring: each is in the list or refused, and what is in the list runs."""
    if name not in SCHEDULES:
        with pytest.raises(ValueError, match=rf"^lr_scheduler_type='{name}': expected one of linear, .*inverse_sqrt"):
            make(lr_scheduler_type=name)
        return
    for steps in (1, 2, 3, 50):
        for ratio in (0.0, 0.03, 0.5, 0.99):
            config = make(lr_scheduler_type=name, lr_scheduler_kwargs=TOLD.get(name), warmup_ratio=ratio, lr=1e-3)
            rates = learning_rates(config, steps)
            assert all(0 < rate <= 1e-3 for rate in rates), (steps, ratio, rates)


TOLD = {
    **dict.fromkeys(("cosine_with_min_lr", "cosine_warmup_with_min_lr"), {"min_lr_rate": 0.1}),
    "warmup_stable_decay": {"num_decay_steps": 1},
}
"""What a schedule must be told."""


def learning_rates(config: TrainConfig, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    schedule = scheduler(config, optimizer, steps)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name != "constant" and name not in TOLD])
def test_the_warm_up_rises_from_its_first_step_and_the_rest_is_transformers_own(name):
    config, steps, warmup = make(lr_scheduler_type=name, warmup_ratio=0.2, lr=1.0), 20, 4
    rates = learning_rates(config, steps)
    assert rates[:warmup] == [0.25, 0.5, 0.75, 1.0]
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    assert theirs.get_last_lr() == [0.0]  # what step 1 would have
    for step in range(1, steps):
        optimizer.step()
        theirs.step()
        assert step < warmup or rates[step] == theirs.get_last_lr()[0]


def test_values_are_shown_on_one_short_line():
    assert shown("a\nb") == "'a\\nb'" and len(shown("x" * 1000)) < 100
    assert shown(10**5000) == "a number of 16610 bits" and shown([10**5000]) == "a list"
    assert shown(Path("x")) == repr(Path("x"))
