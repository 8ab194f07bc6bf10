"""report.html: one page without an address, whatever strangers have written; its curves stay within their plots."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from training import a_base, a_config, a_finished_run, on_cpu, one_thread, some_data  # noqa: F401  (fixtures)

from fastlora import drawing, page

HOSTILE = "</pre></svg></title><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\x00\x1b\ud800\u202e"
VOID = {"meta", "line", "rect", "circle", "polyline"}


class Outline(HTMLParser):
    """The elements of a page, each of which is closed where it must be, and the words in them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def shapes(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def assert_alone(text: str) -> Outline:
    """A page that loads and runs nothing, and is whole."""
    outline = Outline(text)
    assert outline.open == [] and outline.seen[0][0] == "html"
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "h3",
        "p",
        "table",
        "tr",
        "th",
        "td",
        "pre",
    }
    allowed |= {"details", "summary", "svg", "text", "line", "polyline", "circle", "rect", "code", "b"}
    assert {tag for tag, _ in outline.seen} <= allowed
    for tag, attributes in outline.seen:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "href", "style")], tag
    assert "://" not in text and not re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]", text)
    policy = [one["content"] for tag, one in outline.seen if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]
    return outline


def summary_of(finished) -> dict:
    return json.loads((finished / "summary.json").read_text())


def test_a_training_leaves_a_page_that_is_whole_and_alone(finished, data):
    text = (finished / page.NAME).read_text()
    outline = assert_alone(text)
    summary = summary_of(finished)
    for word in (
        f"{summary['loss']:.4f}",
        "cpu",
        "6",
        str(data),
        summary["data"][0]["sha256"],
        "max_steps",
        "transformers",
    ):
        assert word in outline.words, word
    assert "cpu, float32, fastlora " in text  # what it was computed in, where the option says auto
    (losses,) = shapes(text)
    assert [one.find("title").text for one in losses.findall("polyline")] == ["step", "running mean"]
    assert "Held-out loss" not in text and "Answers before and after" not in text and "by task" not in text
    layers = text.split("What ran in each layer")[1].split("<h2>")[0]
    assert "model.layers.*.mlp.down_proj" in layers and "lm_head" in layers
    assert sum(int(number) for number in re.findall(r"<tr><td>(\d+)</td>", layers)) > 15
    assert text.count("prefers-color-scheme: dark") == 1


def records_of(count: int, tasks=("a", "b")) -> list[dict]:
    return [
        {
            "step": step,
            "loss": 3.0 / step,
            "tasks": {name: {"rows": 2, "loss": (1 + place) / step} for place, name in enumerate(tasks) if step % (1 + place) == 0},
        }
        for step in range(1, count + 1)
    ]  # fmt: skip


VALIDATIONS = [
    {"step": 2, "eval_loss": 2.0, "eval_tokens": 10, "eval_rouge1": 0.1, "eval_exact_match": 0.0, "retain_loss": 1.0},
    {"step": 4, "eval_loss": 1.5, "eval_tokens": 10, "eval_rouge1": 0.4, "eval_exact_match": None, "retain_loss": 1.2},
]
SAMPLES = [
    {"step": 2, "source": "e:1", "prompt": "Q1", "reference": "R1", "answer": "first"},
    {"step": 4, "source": "e:1", "prompt": "Q1", "reference": "R1", "answer": "middle"},
    {"step": 6, "source": "e:1", "prompt": [{"role": "user", "content": "Q1"}], "reference": "R1", "answer": "other"},
    {"step": 6, "source": "e:1", "prompt": "Q1", "reference": "R1", "answer": "last"},
]


def test_tasks_validation_and_samples_are_shown_where_there_are_any(finished):
    text = page.html(summary_of(finished), records_of(6), VALIDATIONS, SAMPLES, [])
    outline = assert_alone(text)
    losses, tasks, held_out, scores = shapes(text)
    names = [[one.find("title").text for one in svg.findall("polyline")] for svg in (losses, tasks, held_out, scores)]
    assert names == [
        ["step", "running mean"],
        ["a", "b"],
        ["retained rows", "held-out rows"],
        ["rouge1", "exact_match"],
    ]
    assert "forgetting" in text and {"first", "last", "other", "R1", "step 2", "step 6"} <= set(outline.words)
    assert "middle" not in outline.words
    assert '[{"role": "user", "content": "Q1"}]' in outline.words
    assert "12" in outline.words  # rows of task a
    assert "Plain PyTorch in all of them." in outline.words


def test_the_answers_after_are_those_of_the_weights_that_are_left(finished):
    text = page.html(summary_of(finished) | {"validation": {"step": 4}}, records_of(6), VALIDATIONS, SAMPLES, [])
    words = assert_alone(text).words
    assert {"first", "middle"} <= set(words) and "last" not in words


def test_whatever_strangers_wrote_is_shown_and_does_nothing(finished):
    summary = summary_of(finished)
    summary["config"] |= dict.fromkeys(("model", "output", "method", "dtype", "truncation"), HOSTILE)
    summary["versions"][HOSTILE] = HOSTILE
    summary["data"] = [{"option": HOSTILE, "file": HOSTILE, "rows": None, "sha256": HOSTILE}]
    summary |= {
        "device": HOSTILE,
        "compute_dtype": HOSTILE,
        "date": HOSTILE,
        "best_step": HOSTILE,
        "changed": {HOSTILE: HOSTILE},
    }
    validations = [{"step": 1, "eval_loss": 1.0, HOSTILE: HOSTILE, f"eval_{HOSTILE}": 0.5}]
    samples = [dict.fromkeys(("step", "source", "prompt", "reference", "answer"), HOSTILE)]
    layers = [(HOSTILE, HOSTILE, HOSTILE)]
    text = page.html(summary, records_of(3, tasks=(HOSTILE,)), validations, samples, layers)
    outline = assert_alone(text)
    shown = drawing.UNPRINTABLE.sub("\ufffd", HOSTILE)
    assert sum(shown in word for word in outline.words) > 20
    assert [svg.tag for svg in shapes(text)] == ["svg"] * 4


@pytest.mark.parametrize("value", [None, "1", True, float("nan"), float("inf"), [], 10**400])
def test_what_is_no_number_is_left_out_of_curves(finished, value):
    records = [
        {"step": 1, "loss": 1.0, "tasks": {"a": {"rows": value, "loss": value}}},
        {"step": 2, "loss": 2.0, "tasks": value},
    ]
    validations = [{"step": value, "eval_loss": 1.0}, {"step": 2, "eval_loss": value}, {"step": 3, "eval_loss": 1.0}]
    assert_alone(page.html(summary_of(finished), records, validations, [{"step": value, "prompt": value}], []))


def test_many_samples_and_long_texts_are_cut(finished):
    samples = [
        {"step": 1, "source": f"e:{n}", "prompt": "Q", "reference": "R", "answer": "x" * 10**5} for n in range(50)
    ]
    text = page.html(summary_of(finished), records_of(1), [], samples, [])
    assert "And 30 more in samples.jsonl." in text and len(text) < 200_000
    assert assert_alone(text).words.count("x" * page.CHARACTERS + " ...") == page.SHOWN


def test_lines_are_read_back_and_a_bad_one_is_named(tmp_path):
    assert page.read_lines(tmp_path / "none.jsonl") == []
    path = tmp_path / "some.jsonl"
    path.write_text('{"step": 1}\n{"step": NaN}\n')
    first, second = page.read_lines(path)
    assert first == {"step": 1} and second["step"] != second["step"]
    path.write_text('{"step": 1}\n[1]\n')
    with pytest.raises(ValueError, match=r"some.jsonl:2: expected a JSON object"):
        page.read_lines(path)


def test_what_lies_beside_is_shown(finished, tmp_path):
    lines = [json.dumps(one) + "\n" for one in VALIDATIONS]
    (tmp_path / page.VALIDATION).write_text("".join(lines))
    (tmp_path / page.SAMPLES).write_text(json.dumps(SAMPLES[0]) + "\n")
    summary = summary_of(finished)
    page.write(tmp_path, summary, records_of(4), [])
    text = (tmp_path / page.NAME).read_text()
    assert_alone(text)
    assert "Held-out loss" in text and "Q1" in text
