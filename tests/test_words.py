"""What counts as the same text, the same word and the same answer, in any script."""
# ruff: noqa: RUF001

from collections.abc import Sequence
from typing import Any

import pytest

from rl_llm.rewards import bleu, chrf, exact_match, regex, rouge, ter, token_f1, vocab
from rl_llm.rewards.form import Length
from rl_llm.rewards.words import words


def lengths(texts: Sequence[str], **settings: Any) -> list[float]:
    return [-value for value in Length(**settings)(texts, [[]] * len(texts))]


SPELLINGS = [
    ("café", "cafe\u0301"),
    ("cooperate", "co\u00adoperate", "coop\u200berate", "cooperate\ufeff"),
    ("می\u200cخواهم", "میخواهم", "\u200fمی\u200cخواهم"),
    ("ok ❤\ufe0f", "ok ❤"),
    ("パリ", "ハ\u309aリ"),
]
COMPATIBLE = [("find abc12", "ﬁnd ＡＢＣ１２"), ("パリ", "ﾊﾟﾘ"), ("20 °c", "20℃")]


@pytest.mark.parametrize("texts", [*SPELLINGS, *COMPATIBLE])
def test_spellings_of_one_text_have_the_same_words(texts: tuple[str, ...]) -> None:
    reference, ones = [texts[0]] * len(texts), [1.0] * len(texts)
    assert exact_match(texts, reference) == token_f1(texts, reference) == rouge(texts, reference) == ones
    assert len({tuple(words(text)) for text in texts}) == len(set(lengths(texts))) == 1


@pytest.mark.parametrize("texts", SPELLINGS)
def test_spellings_of_one_text_are_one_text_for_every_metric(texts: tuple[str, ...]) -> None:
    reference, ones = [texts[0]] * len(texts), [1.0] * len(texts)
    assert exact_match(texts, reference, normalize="squad") == token_f1(texts, reference, normalize="squad") == ones
    assert bleu(texts, reference) == chrf(texts, reference) == pytest.approx(ones)
    assert set(ter(texts, reference)) == {0}
    assert len(set(lengths(texts, unit="characters"))) == 1


@pytest.mark.parametrize(("text", "other"), [("2²", "22"), ("10⁵", "105"), ("½", "12"), ("10⁻⁵", "10⁵"), ("x₁", "x1")])
def test_superscripts_subscripts_and_fractions_are_other_values(text: str, other: str) -> None:
    assert exact_match([text, other], [other, text]) == [0, 0]
    assert exact_match([text, text], [other, text], normalize="squad")[1] == 1


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("กรุงเทพ ๒๕๖๗", 7),
        ("ວຽງຈັນ", 5),
        ("ភ្នំពេញ", 4),
        ("မြန်မာ", 3),
        ("北京大学", 4),
        ("ひらがな", 4),
        ("सूर्य नमस्कार", 2),
    ],
)
def test_scripts_without_spaces_are_cut_by_character_with_what_stands_on_it(text: str, count: int) -> None:
    assert lengths([text, f"ok{'' if count > 2 else ' '}{text} 3"]) == [count, count + 2]
    assert vocab([f"{text} {text}"], kind="distinct", n=1) == [len(set(words(text))) / (2 * count)]
    half, reference = ["".join(words(text)[: count // 2])], [text]
    assert all(0 < found[0] < 1 for found in (token_f1(half, reference), rouge(half, reference), bleu(half, reference)))
    assert -1 < ter(half, reference)[0] < 0
    # chrF++ counts words beside characters, and those of a half are there.
    assert 0 < chrf([half[0] + half[0]], reference, word_order=2)[0] < 1
    assert chrf(["x"], ["y"], word_order=2) == [0]


@pytest.mark.parametrize(
    ("text", "same", "others"),
    [
        ("-5", ["−5", "–5", "－5", "-5.", "(-5)"], ["5", "+5", "x-5"]),
        ("5", ["5.", "5!", "**5**", "(5)", "'5'", "…5"], ["-5", ".5", "5.0", "50", "5%", "$5", "<5", "5²"]),
        ("3.14", ["3.14.", "３．１４"], ["314", "3 14", "3,14", "-3.14", ".314"]),
        (".5", ["(.5)"], ["5", "-.5"]),
        ("1/2", ["1⁄2", "1/2."], ["12", "1 2", "2/1", "½"]),
        ("1000", ["1,000"], ["1.000", "1,00,0", "1 000"]),
        ("1,234,567.5", ["1234567.5"], ["12345675"]),
        ("1, 2, 3", ["1,2,3"], ["123", "1,23"]),
        ("50%", ["50 %"], ["50"]),
        ("$5", [], ["5", "€5", "-$5"]),
        ("x^2", ["x^2."], ["x2", "x*2", "x/2", "x-2", "x 2"]),
        ("1990–1995", ["1990-1995"], ["19901995", "1990", "1990 1995"]),
        ("3:45", [], ["345", "3.45", "3/45"]),
        ("C++", ["c++", "C++."], ["C", "C#", "C+"]),
        ("C#", ["c#,"], ["C"]),
        ("R&D", [], ["RD"]),
        ("-", ["−"], ["", "+", "."]),
        ("A", ["a", "A.", "(A)"], ["", "the", "B"]),
        ("Vitamin A", [], ["vitamin"]),
        ("the U.S.", ["US", "**U.S.**", "`us`"], ["U"]),
        ("don’t", ["dont", "DON'T"], ["don"]),
        ("Jean-Paul", ["jeanpaul"], ["jean"]),
    ],
)
def test_an_answer_is_its_value(text: str, same: list[str], others: list[str]) -> None:
    equal = [text, *same]
    assert exact_match(equal, [text] * len(equal)) == [1] * len(equal)
    assert {other for other in others if exact_match([text, other], [other, text]) != [0, 0]} == set()


@pytest.mark.parametrize(("text", "other"), [("-5", "5"), ("3.14", "314"), ("1/2", "12"), ("C++", "C"), ("A", "")])
def test_another_value_shares_no_word_except_by_the_rule_of_squad(text: str, other: str) -> None:
    assert token_f1([text, other], [other, text]) == [0, 0]
    for measure in (token_f1, exact_match):
        assert measure([text, other], [other, text], normalize="squad") == [1, 1]


def test_conventions_of_english_are_for_english() -> None:
    assert exact_match(["1,000"], ["1000"], language="de") == [0]
    assert exact_match(["an die See"], ["die See"], language="de") == [0]


def test_every_character_counts_but_for_the_space_around() -> None:
    completions = [" Paris", "Paris\n", "paris", "Paris.", "New  York", "cafe\u0301"]
    reference = ["Paris", " Paris", "Paris", "Paris", "New York", "café"]
    assert exact_match(completions, reference, normalize=False) == [1, 1, 0, 0, 0, 0]


def test_a_pattern_for_the_whole_text_may_leave_out_the_space_around() -> None:
    assert regex([" B", "B", "B\n", " BB"], pattern="[A-D]", match="full") == [1, 1, 1, 0]
    assert regex([" B", "B"], pattern=" B", match="full") == [1, 0]
