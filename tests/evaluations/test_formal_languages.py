"""The languages against automata and regular expressions of their own, and the metric."""

import re

import pytest
import torch

from evaluations.task import TEST_SEED, VALIDATION_SEED
from evaluations.tasks.formal_languages import BINS, LANGUAGES, FormalLanguage


def depths(word):
    """By kind of bracket, after every letter."""
    kinds = {"(": (0, 1), ")": (0, -1), "[": (1, 1), "]": (1, -1)}
    now, found = [0, 0], []
    for letter in word:
        kind, step = kinds[letter]
        now[kind] += step
        found.append(tuple(now))
    return found


def is_balanced(word):
    found = depths(word)
    return min(map(min, found)) >= 0 and found[-1] == (0, 0)


MEMBER = {
    "parity": re.compile("[01]*").fullmatch,
    "(aa)*": re.compile("(aa)*").fullmatch,
    "(abab)*": re.compile("(abab)*").fullmatch,
    "a^n b^n": lambda w: w == "a" * (len(w) // 2) + "b" * (len(w) // 2),
    "a^n b^n c^n": lambda w: w == "".join(x * (len(w) // 3) for x in "abc"),
    "shuffle-2": is_balanced,
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_words_are_of_the_language_and_of_their_bin(name):
    task = FormalLanguage(name)
    for low, high in BINS.values():
        words = task.held_out(low, high, seed=3)
        assert all(MEMBER[name](word) and low <= len(word) <= high for word in words)
        longest = max(map(len, words))
        assert longest > high - task.language.period
        assert {len(word) for word in words} == set(task.lengths(low, high))


def may_follow(name, prefix, letter, word_length):
    """Whether ``prefix`` + ``letter`` can still become a word, by trying."""
    if letter == "T":
        return MEMBER[name](prefix) and len(prefix) > 1
    longer = prefix + letter
    return any(
        MEMBER[name](longer + end)
        for n in range(word_length)
        for end in [
            "b" * n,
            *("b" * m + "c" * n for m in range(word_length)),
            *("a" * m + "b" * (n + m) for m in (0, 1)),
        ]
    )


@pytest.mark.parametrize("name", ["a^n b^n", "a^n b^n c^n"])
def test_the_answers_are_the_letters_that_may_follow(name):
    letters = LANGUAGES[name].letters
    word = LANGUAGES[name].word(12, None)
    for i, row in enumerate(LANGUAGES[name].answers(word)):
        prefix = word[: i + 1]
        # After the first letters either one more of them or the second kind may come.
        n = 12 // len(letters)
        expected = {"a", "b"} if i < n else {word[i + 1]} if i + 1 < 12 else {"T"}
        assert {x for x, answer in zip((*letters, "T"), row) if answer} == expected
        if name == "a^n b^n":
            assert expected == {x for x in "abT" if may_follow(name, prefix, x, 14)}


def test_answers_known_by_hand():
    assert LANGUAGES["parity"].answers("0110") == [[1, 0], [0, 1], [1, 0], [1, 0]]
    assert LANGUAGES["(aa)*"].answers("aaa") == [[0, 1], [1, 0], [0, 1]]
    assert [row[0] for row in LANGUAGES["(abab)*"].answers("abababab")] == [0, 0, 0, 1, 0, 0, 0, 1]
    assert LANGUAGES["shuffle-2"].answers("([)]") == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 1], [1, 0, 1, 0]]


def test_closing_brackets_may_come_where_a_bracket_is_open():
    met = set()
    for word in FormalLanguage("shuffle-2").held_out(40, 50, seed=0)[:20]:
        found = [(row[1], row[3]) for row in LANGUAGES["shuffle-2"].answers(word)]
        assert found == [(int(a > 0), int(b > 0)) for a, b in depths(word)]
        met |= set(found)
    assert len(met) == 4


def test_a_word_counts_when_all_its_answers_are_right():
    task = FormalLanguage("parity")
    ids, answers = task.encode(["011", "10"])
    assert ids.tolist() == [[1, 2, 2], [2, 1, 0]]
    logits = torch.where(answers == 1, 3.0, -3.0)
    assert task.right(logits, answers).tolist() == [True, True]
    logits[1, 2] = 3.0  # behind the end of the word
    logits[0, 1, 0] *= -1
    assert task.right(logits, answers).tolist() == [False, True]


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_model_that_knows_the_answers_has_all_points_and_one_that_never_changes_has_none(name):
    task = FormalLanguage(name)

    def perfect(ids):
        words = ["".join(task.language.letters[i - 1] for i in row if i) for row in ids.tolist()]
        return 2 * task.encode(words)[1] - 1

    assert task.evaluate(perfect, final=True) == {"2-50": 1.0, "51-100": 1.0}
    constant = task.evaluate(lambda ids: torch.ones(*ids.shape, task.outputs), final=True)
    assert max(constant.values()) == 0.0


def test_words_of_training_validation_and_test_differ():
    task = FormalLanguage("parity")
    drawn = [set(task.held_out(40, 50, seed)) for seed in (TEST_SEED, VALIDATION_SEED)]
    assert drawn[0].isdisjoint(drawn[1])
    trained = {tuple(row) for step in range(50) for row in task.batch(32, step)[0].tolist()}
    assert all(trained.isdisjoint(map(tuple, task.encode(words)[0].tolist())) for words in map(list, drawn))
    with pytest.raises(ValueError, match=r"name: expected one of parity, .*, got 'dyck'"):
        FormalLanguage("dyck")
