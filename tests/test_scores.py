"""Scores of answers: by a well-kept library where there is one, and by their definitions where there is none."""

import pytest

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


def test_scores_are_told_apart_and_accuracy_where_there_are_labels():
    found = scores(["yes", "no"], ["yes", "yes it is"])
    assert found.keys() == {"exact_match", "f1", "rouge1", "rouge2", "rougeL"} and found["exact_match"] == 0.5
    assert scores(["no"] * 4, ["yes", "no"] * 2)["accuracy"] == 0.5
    assert {name: found[name] for name in ("rouge1", "rouge2", "rougeL")} == rouge(["yes", "no"], ["yes", "yes it is"])
