"""The six: what each trains, which differences decide it, and what its runs say."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastlora.comparison import Outcome

from . import verdicts
from .material import Rows, mixed
from .trials import ATTENTION, LORA, Bench, Found, Pair, Trial

REHEARSED = 0.1  # of the rows
FORGETTING = ("full", "lora, r 4", LORA, "lora, r 64")
ALL = "dialogues"  # the trial on all dialogues, which four experiments look at


@dataclass(frozen=True)
class Chart:
    title: str
    across: str
    up: str
    lines: dict[str, list[tuple[float, float]]]
    is_log: bool = False
    names: tuple[str, ...] = ()  # of 0, 1, 2 and so on across, where these are no numbers: bars then


@dataclass(frozen=True)
class Told:
    """What an experiment says: a table, sentences, curves, and the bare figures."""

    head: list[str]
    rows: list[list[str]]
    says: list[str]
    charts: list[Chart]
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    claim: str
    trials: Callable[[Bench], list[Trial]]
    reference: Callable[[dict[str, Found]], tuple[Found, str]]  # whose three seeds say what a difference is worth
    pairs: Callable[[dict[str, Found]], list[Pair]]
    tell: Callable[[Bench, dict[str, Found]], Told]
    metric: str = "rouge1"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"


def _rate(found: Found, kind: str) -> str:
    """The best, with a mark where it lies at the edge of those tried."""
    return f"{found.best(kind).lr:g}" + ("!" if found.is_at_edge(kind) else "")


def _rouge(found: Found, kind: str) -> str:
    """Over the seeds that there are."""
    mean, spread = verdicts.mean_and_spread(found.values(kind, "rouge1"))
    return _percent(mean) + (f" ± {100 * spread:.1f}" if spread is not None else "")


def _rouge1(one: Outcome) -> float:
    """It is there: the command asks for the package."""
    assert one.rouge1 is not None
    return one.rouge1


def failed_rows(found: dict[str, Found], width: int) -> list[list[str]]:
    """A table's rows of that many cells for the runs that diverged."""
    said = [(f"{one.kind} ({name}), rate {one.lr:g}", one) for name, each in found.items() for one in each.failed]
    said += [(f"{one.kind} ({name}), seed {seed}", one)
             for name, each in found.items() for (_, seed), one in each.failed_seeds.items()]  # fmt: skip
    return [[name, f"failed in step {one.step}", *["-"] * (width - 2)] for name, one in said]


def tell_runs(found: dict[str, Found]) -> Told:
    """Every run by itself, where too many failed to conclude anything."""
    rows = [
        [name, one.kind, "-" if one.lr is None else f"{one.lr:g}", _percent(one.rouge1), f"{one.loss:.3f}"]
        for name, each in found.items()
        for one in each.outcomes
    ]
    return Told(["trained on", "method", "rate", "ROUGE-1", "loss"], rows, [], [])


def _whole(bench: Bench, **more: Any) -> Trial:
    """Every experiment that looks at it adds methods and ranks; its folder is one."""
    return bench.trial(ALL, bench.rows.dialogues, others=True, **more)


# How many examples


def _sizes(bench: Bench) -> list[int]:
    """Those that there are rows for: the largest is all of them, if there are fewer."""
    have = len(bench.rows.examples.train)
    return list(dict.fromkeys(min(size, have) for size in bench.sizes.examples))


def _example_trials(bench: Bench) -> list[Trial]:
    task = bench.rows.examples
    return [
        bench.trial(f"examples-{size}", task, task.train[:size], steps=bench.sizes.steps_of(size))
        for size in _sizes(bench)
    ]


def _enough(found: dict[str, Found], kind: str) -> Found:
    """The first trial whose best has the share of the gain that is enough; by one seed, to choose the pair by."""
    trials = list(found.values())
    points = [(float(len(one.trial.train)), _rouge1(one.best(kind))) for one in trials]
    size = verdicts.size_at(points, _rouge1(trials[0].base))
    return next((one for one in trials if size is not None and len(one.trial.train) >= size), trials[-1])


def _example_pairs(found: dict[str, Found]) -> list[Pair]:
    last, enough = list(found.values())[-1], _enough(found, LORA)
    pairs: list[Pair] = [((last, "full"), (last, LORA))]
    return pairs if enough is last else [*pairs, ((enough, LORA), (last, LORA))]


def _tell_examples(bench: Bench, found: dict[str, Found]) -> Told:
    trials = list(found.values())
    base = _rouge1(trials[0].base)
    says = [f"the base's ROUGE-1 is {_percent(base)}"]
    lines: dict[str, list[verdicts.Point]] = {}
    sizes: dict[str, float | None] = {}
    for kind in ("full", LORA):
        lines[kind] = [(float(len(one.trial.train)), one.mean(kind, "rouge1")) for one in trials]
        sizes[kind] = verdicts.size_at(lines[kind], base)
        told = (
            "it gains nothing" if sizes[kind] is None else f"90 % of its best gain is there at {sizes[kind]:.0f} rows"
        )
        says.append(f"{kind}: {told}")
    rows = [
        [str(len(one.trial.train)), str(one.trial.steps)]
        + [text for kind in lines for text in (_rouge(one, kind), _rate(one, kind))]
        for one in trials
    ]
    head = ["rows", "steps", *(text for kind in lines for text in (f"{kind}: ROUGE-1", "rate"))]
    chart = Chart("ROUGE-1 by rows", "rows trained on", "ROUGE-1", {**lines, "base": _flat(lines["full"], base)}, True)
    return Told(head, rows, says, [chart], {"base": base, "rouge1": lines, "rows_at_90_percent": sizes})


def _flat(line: Sequence[tuple[float, float]], value: float) -> list[tuple[float, float]]:
    return [(line[0][0], value), (line[-1][0], value)]


# What is forgotten


def _clusters(bench: Bench) -> tuple[dict[str, Rows], list[str]]:
    """Those that may be trained on, and the names of those held out.

    Raises:
        ValueError: none is left to be held out.
    """
    names, most = list(bench.rows.clusters), max(bench.sizes.clusters)
    if len(names) <= most:
        raise ValueError(f"clusters: got {len(names)}, expected more than {most}: the last ones are held out")
    return {name: bench.rows.clusters[name] for name in names[:most]}, names[most:]


def _forgetting_trials(bench: Bench) -> list[Trial]:
    task, (clusters, _) = bench.rows.dialogues, _clusters(bench)
    kinds = {name: one.train for name, one in clusters.items()}
    rehearsed = max(1, round(len(task.train) * REHEARSED / (1 - REHEARSED)))
    few = mixed({"task": task.train, "others": mixed(kinds, rehearsed)}, 2 * len(task.train))
    many = mixed({"task": task.train, "others": mixed(kinds, len(task.train))}, 2 * len(task.train))
    return [
        _whole(bench, ranks=(4, 16, 64)),
        bench.trial("rehearsal", task, few, others=True),
        bench.trial("mixture", task, many, others=True),
    ]


def _paths(found: Found) -> dict[str, list[verdicts.Point]]:
    """Of each kind (ROUGE-1, rise of the loss on other tasks) from the base through rising rates."""
    begin = (_rouge1(found.base), 0.0)
    kinds = [kind for kind in FORGETTING if found.of(kind)]
    return {kind: [begin, *((_rouge1(one), found.rise(one, ["other"])) for one in found.of(kind))] for kind in kinds}


def _tell_forgetting(bench: Bench, found: dict[str, Found]) -> Told:
    _, held = _clusters(bench)
    names = {"other": ["other"], "held-out clusters": [f"cluster/{name}" for name in held]}
    paths = {f"{kind}, {name}": path for name, one in found.items() for kind, path in _paths(one).items()}
    common = verdicts.common_score(list(paths.values()))
    rows: list[list[str]] = []
    figures: dict[str, Any] = {}
    before = found[ALL].base
    accuracies = [_percent(found[ALL].accuracy(before, group)) for group in names.values()]
    rows.append(["base", "", "", _percent(before.rouge1), "", *accuracies, "", ""])
    for name, one in found.items():
        for kind in _paths(one):
            best, at = one.best(kind), verdicts.forgotten_at(paths[f"{kind}, {name}"], common)
            rises = [one.rise(best, group) for group in names.values()]
            accuracy = [one.accuracy(best, group) for group in names.values()]
            figures[f"{kind}, {name}"] = {"rise_at_equal_rouge1": at, "rise": rises, "accuracy": accuracy}
            told = "-" if at is None else f"{at:+.3f}"
            rows.append([name, kind, _rate(one, kind), _rouge(one, kind), f"{rises[0]:+.3f}", *map(_percent, accuracy),
                         f"{rises[1]:+.3f}", told])  # fmt: skip
    head = ["trained on", "method", "rate", "ROUGE-1", "other tasks: loss", "their accuracy", "held-out clusters: accuracy",
            "loss", f"other tasks: loss at ROUGE-1 {_percent(common)}"]  # fmt: skip
    ranked = sorted((one["rise_at_equal_rouge1"], name) for name, one in figures.items())
    says = [
        f"at ROUGE-1 {_percent(common)}, which all reach, the loss on other tasks has risen least in: {ranked[0][1]}"
    ]
    says.append(f"and most in: {ranked[-1][1]}")
    says.append("all have as many steps: of the mixture's rows half are dialogues")
    chart = Chart(
        "Learning against forgetting, by rising rate", "ROUGE-1", "rise of the loss on other tasks, nats", paths
    )
    return Told(head, rows, says, [chart], {"common_rouge1": common, "paths": paths, "runs": figures})


# Kinds of tasks


def _cluster_trials(bench: Bench) -> list[Trial]:
    clusters, held = _clusters(bench)
    unseen = {name: bench.rows.clusters[name].test for name in held}
    count = bench.sizes.steps * bench.sizes.batch_size
    trials = []
    for number in bench.sizes.clusters:
        some = dict(list(clusters.items())[:number])
        seen = mixed({name: one.validation for name, one in some.items()}, bench.sizes.held)
        task = Rows(
            mixed({name: one.train for name, one in some.items()}, count), seen, mixed(unseen, bench.sizes.held)
        )
        # A rate is chosen by what is trained on, or what is held out would not be.
        tokens = count * bench.sizes.max_length // 2
        trials.append(bench.trial(f"clusters-{number}", task, methods=("lora",), others=True, by_tokens=tokens))
    return trials


def _tell_clusters(bench: Bench, found: dict[str, Found]) -> Told:
    _, held = _clusters(bench)
    groups = [f"cluster/{name}" for name in held]
    trials = list(found.values())
    base = trials[0].base
    numbers = [float(number) for number in bench.sizes.clusters]
    losses = [(0.0, base.loss), *((n, one.mean(LORA, "loss")) for n, one in zip(numbers, trials, strict=True))]
    rights = [(0.0, trials[0].accuracy(base, groups))]
    rights += [(n, one.accuracy(one.best(LORA), groups)) for n, one in zip(numbers, trials, strict=True)]
    other = [(0.0, trials[0].accuracy(base, ["other"]))]
    other += [(n, one.accuracy(one.best(LORA), ["other"])) for n, one in zip(numbers, trials, strict=True)]
    rows = [["0", "-", f"{base.loss:.3f}", _percent(rights[0][1]), _percent(other[0][1])]]
    for number, one in enumerate(trials, 1):
        rows.append([f"{numbers[number - 1]:.0f}", _rate(one, LORA), f"{losses[number][1]:.3f}",
                     _percent(rights[number][1]), _percent(other[number][1])])  # fmt: skip
    fewer, more = losses[1][1], losses[-1][1]
    says = [
        f"held out: {', '.join(held)}; from {numbers[0]:.0f} to {numbers[-1]:.0f} clusters their loss changes by {more - fewer:+.3f},"
        f" their accuracy by {100 * (rights[-1][1] - rights[1][1]):+.1f} points"
    ]
    charts = [
        Chart("Unseen clusters, zero-shot", "clusters trained on", "loss, nats a token", {"held-out clusters": losses}),
        Chart("Accuracy", "clusters trained on", "accuracy", {"held-out clusters": rights, "other tasks": other}),
    ]
    head = ["clusters", "rate", "held-out clusters: loss", "their accuracy", "other tasks: accuracy"]
    return Told(head, rows, says, charts, {"held_out": held, "loss": losses, "accuracy": rights, "other": other})


# Ranks


def _rank_trials(bench: Bench) -> list[Trial]:
    attention = bench.trial("attention", bench.rows.dialogues, methods=("lora",), target_modules=ATTENTION)
    return [_whole(bench, ranks=bench.sizes.ranks), attention]


def _cost(found: Found, kind: str) -> list[str]:
    one = found.best(kind)
    assert one.seconds_per_step is not None
    peak = "-" if one.peak_bytes is None else f"{one.peak_bytes / 1e9:.2f}"
    return [f"{one.trainable_parameters:,}", f"{one.file_bytes / 1e6:.3g}", f"{one.seconds_per_step:.3g}", peak]


COST = ["trained", "file MB", "s a step", "peak GB"]


def _tell_ranks(bench: Bench, found: dict[str, Found]) -> Told:
    whole, attention = found[ALL], found["attention"]
    kinds = [(whole, "full"), *((whole, f"lora, r {r}") for r in bench.sizes.ranks), (attention, LORA)]
    names = [kind if one is whole else f"{kind}, attention only" for one, kind in kinds]
    base, full = _rouge1(whole.base), whole.mean("full", "rouge1")
    shares = [verdicts.share_of_gain(base, full, one.mean(kind, "rouge1")) for one, kind in kinds]
    rows = [
        [name, _rate(one, kind), _rouge(one, kind), _percent(share), *_cost(one, kind)]
        for name, (one, kind), share in zip(names, kinds, shares, strict=True)
    ]
    ranks = [(float(r), whole.mean(f"lora, r {r}", "rouge1")) for r in bench.sizes.ranks]
    seconds = [(float(r), float(whole.best(f"lora, r {r}").seconds_per_step or 0)) for r in bench.sizes.ranks]
    full_seconds = float(whole.best("full").seconds_per_step or 0)
    lines = {"lora": ranks, "full": _flat(ranks, full), "attention only": [(16.0, attention.mean(LORA, "rouge1"))]}
    charts = [
        Chart("ROUGE-1 by rank", "rank", "ROUGE-1", lines, True),
        Chart("A step", "rank", "seconds", {"lora": seconds, "full": _flat(seconds, full_seconds)}, True),
    ]
    close = [f"{r:.0f}" for (r, _), share in zip(ranks, shares[1:], strict=False) if share is not None
             and share >= verdicts.SHARE_GOAL]  # fmt: skip
    says = [f"ranks with at least 92.8 % of full's gain: {', '.join(close) or 'none'}"]
    head = ["method", "rate", "ROUGE-1", "% of full's gain", *COST]
    return Told(head, rows, says, charts, {"base": base, "share_of_gain": dict(zip(names, shares, strict=True))})


# Soft prompts


def _prompt_trials(bench: Bench) -> list[Trial]:
    return [
        _whole(bench, methods=("lora",)),
        *(
            bench.trial(f"prompt-{length}", bench.rows.dialogues, methods=("prompt",), num_virtual_tokens=length)
            for length in bench.sizes.prompts
        ),
    ]


def _best_prompt(found: dict[str, Found]) -> Found:
    """By the rows to choose by."""
    return min((one for name, one in found.items() if name != ALL), key=lambda one: one.best("prompt").eval_loss)


def _tell_prompts(bench: Bench, found: dict[str, Found]) -> Told:
    whole = found[ALL]
    prompts = [one for name, one in found.items() if name != ALL]
    base, lora = _rouge1(whole.base), whole.mean(LORA, "rouge1")
    rows: list[list[str]] = []
    shares: dict[str, float | None] = {}
    for one in (whole, *prompts):
        kind = LORA if one is whole else "prompt"
        name = LORA if one is whole else f"prompt of {one.trial.num_virtual_tokens}"
        shares[name] = verdicts.share_of_gain(base, lora, one.mean(kind, "rouge1"))
        speed = f"{one.best(kind).answer_tokens_per_second:.0f}"
        rows.append([name, _rate(one, kind), _rouge(one, kind), _percent(shares[name]), *_cost(one, kind), speed])
    line = [(float(one.trial.num_virtual_tokens), one.mean("prompt", "rouge1")) for one in prompts]
    chart = Chart("ROUGE-1 by a prompt's length", "tokens", "ROUGE-1",
                  {"prompt": line, LORA: _flat(line, lora), "base": _flat(line, base)}, True)  # fmt: skip
    best = _best_prompt(found)
    share = shares[f"prompt of {best.trial.num_virtual_tokens}"]
    says = [f"the best prompt has {best.trial.num_virtual_tokens} tokens and {_percent(share)} % of LoRA's gain"]
    head = ["method", "rate", "ROUGE-1", "% of LoRA's gain", *COST, "answer tokens/s"]
    return Told(head, rows, says, [chart], {"base": base, "share_of_gain": shares})


# The worked example


def _tell_dialogue(bench: Bench, found: dict[str, Found]) -> Told:
    whole = found[ALL]
    base, kinds = _rouge1(whole.base), ("full", LORA)
    scores = [base, *(whole.mean(kind, "rouge1") for kind in kinds)]
    share = verdicts.share_of_gain(*scores)
    times = [whole.best(kind).seconds_per_step or 0.0 for kind in kinds]
    of_time = times[1] / times[0]
    rows = [["base", "-", _percent(base), "-", "-", "-", "-"]]
    rows += [[kind, _rate(whole, kind), _rouge(whole, kind), *_cost(whole, kind)] for kind in kinds]
    published = verdicts.share_of_gain(*verdicts.PUBLISHED.values())
    met = share is not None and share >= verdicts.SHARE_GOAL
    says = [
        f"LoRA has {_percent(share)} % of full's ROUGE-1 gain (goal: at least 92.8, {'met' if met else 'missed'};"
        f" published: {_percent(published)}) in {of_time:.2f} of its time a step"
        f" (goal: at most 0.56, {'met' if of_time <= verdicts.TIME_GOAL else 'missed'})"
    ]
    lines = {"here": [(float(at), score) for at, score in enumerate(scores)],
             "FLAN-T5-base, published": [(float(at), score) for at, score in enumerate(verdicts.PUBLISHED.values())]}  # fmt: skip
    names = ("base", "full fine-tuning", LORA)
    chart = Chart("ROUGE-1 on dialogues that were not trained on", "", "ROUGE-1", lines, names=names)
    figures = {
        "rouge1": dict(zip(verdicts.PUBLISHED, scores, strict=True)),
        "share_of_gain": share,
        "share_of_time": of_time,
    }
    return Told(["method", "rate", "ROUGE-1", *COST], rows, says, [chart], figures)


def _lora_of_all(found: dict[str, Found]) -> tuple[Found, str]:
    return found[ALL], LORA


EXPERIMENTS = {
    "dialogue": Experiment(
        "dialogue summarisation: LoRA keeps most of full fine-tuning's gain at a fraction of its time",
        lambda bench: [_whole(bench)],
        _lora_of_all,
        lambda found: [((found[ALL], "full"), (found[ALL], LORA))],
        _tell_dialogue,
    ),
    "examples": Experiment(
        "500 to 1,000 examples are enough for one task",
        _example_trials,
        lambda found: (list(found.values())[-1], LORA),
        _example_pairs,
        _tell_examples,
    ),
    "ranks": Experiment(
        "LoRA of rank 4 to 32 comes close to full at a fraction of the cost",
        _rank_trials,
        _lora_of_all,
        lambda found: [((found[ALL], "full"), (found[ALL], LORA)), ((found["attention"], LORA), (found[ALL], LORA))],
        _tell_ranks,
    ),
    "prompts": Experiment(
        "soft prompts suffice for large models only",
        _prompt_trials,
        _lora_of_all,
        lambda found: [((_best_prompt(found), "prompt"), (found[ALL], LORA))],
        _tell_prompts,
    ),
    "forgetting": Experiment(
        "full fine-tuning on one task forgets; multitask and PEFT forget less",
        _forgetting_trials,
        _lora_of_all,
        lambda found: [((found[name], LORA), (found[ALL], LORA)) for name in ("rehearsal", "mixture")],
        _tell_forgetting,
    ),
    "clusters": Experiment(
        "more kinds of tasks help an unseen kind",
        _cluster_trials,
        lambda found: (list(found.values())[-1], LORA),
        lambda found: [((list(found.values())[0], LORA), (list(found.values())[-1], LORA))],
        _tell_clusters,
        "loss",
    ),
}
