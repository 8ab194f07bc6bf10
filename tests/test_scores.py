"""Scores of answers: by a well-kept library where there is one, and by their definitions where there is none."""

import string
from random import Random

import pytest
from rouge_score.rouge_scorer import RougeScorer

from fastlora.evaluation import accuracy, labels, rouge, scores, token_f1


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("the Denver Broncos", "Denver Broncos!", 1.0),  # articles, case and punctuation do not count
        ("Denver", "Denver Broncos", 2 / 3),
        ("a b b c", "b b d", 2 * 2 / (3 + 3)),  # a word counts as often as both have it, and a is an article
        ("no", "yes", 0.0),
        ("", "yes", 0.0),
        ("The.", "", 1.0),  # neither has words
        ("don't", "dont", 1.0),
        ("theory", "the", 0.0),
    ],
)
def test_f1_is_squads(answer, reference, expected):
    assert token_f1([answer], [reference]) == pytest.approx(expected, rel=1e-15)
    assert token_f1([answer, "x"], [reference, "x"]) == pytest.approx((expected + 1) / 2, rel=1e-15)


def test_completions_are_labels_where_they_are_few_and_come_again():
    assert labels(["yes", " no", "yes ", "no"]) == {("yes",), ("no",)}
    assert labels(["(A)", "(B)", "(A)", "(B)"]) == {("a",), ("b",)}
    assert labels(["yes"] * 4) == labels(["yes", "no", "maybe"]) == labels([]) == set()
    assert labels([str(i % 20) for i in range(40)]) and not labels([str(i % 21) for i in range(42)])
    assert labels(["5", "-5"] * 2) == labels(["+", "-"] * 2) == set()  # words do not tell them apart


def test_accuracy_is_by_the_words_that_an_answer_begins_with():
    references = ["yes", "no", "not sure", "not", "yes", "no", "not sure", "not"]
    answers = ["Yes, it is.", "no", "Not sure at all", "not surely", "yesterday", "", "not", "is not"]
    assert accuracy(answers, references) == 4 / 8


def test_rouge_is_rouge_scores_of_ascii_and_knows_the_words_of_other_scripts():
    draw, theirs = Random(0), RougeScorer(["rouge1", "rouge2", "rougeL"])
    alphabet = [*string.printable, *["the ", "Cat", " 12 "] * 20]
    for _ in range(200):
        answer, reference = ("".join(draw.choices(alphabet, k=draw.randint(0, 40))) for _ in range(2))
        expected = {name: one.fmeasure for name, one in theirs.score(reference, answer).items()}
        assert rouge([answer], [reference]) == expected, (answer, reference)
    assert theirs.score("Привет, мир", "Привет, мир")["rouge1"].fmeasure == 0
    for text in ("Привет, мир", "Grüße, Österreich", "今日は", "مرحبا بالعالم"):
        assert rouge([text], [text.lower()]) == {"rouge1": 1, "rouge2": 1, "rougeL": 1}, text
    assert (
        rouge(["привет всем"], ["Привет мир"])["rouge1"] == 0.5 and rouge(["猫が寝る"], ["犬が寝る"])["rouge1"] == 0.75
    )
    assert rouge(["GPT猫 a_b"], ["gpt 猫 a b"])["rouge2"] == 1


def test_scores_are_told_apart_and_accuracy_where_there_are_labels():
    found = scores(["yes", "no"], ["yes", "yes it is"])
    assert found.keys() == {"exact_match", "f1", "rouge1", "rouge2", "rougeL"} and found["exact_match"] == 0.5
    assert scores(["no"] * 4, ["yes", "no"] * 2)["accuracy"] == 0.5
    assert {name: found[name] for name in ("rouge1", "rouge2", "rougeL")} == rouge(["yes", "no"], ["yes", "yes it is"])
