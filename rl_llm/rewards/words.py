"""Words of text in any script: the one place where metrics and counts have them cut.

Two spellings of one text are one text here: letters are composed (NFC), and characters that do not show are gone (soft
hyphens, zero-width spaces and joiners, marks of direction). Where words are cut, compatibility forms become the usual
ones (full width, ligatures), but not superscripts, subscripts and fractions: NFKC would make 22 of 2².
"""

import re
import unicodedata
from collections.abc import Callable
from typing import Literal

AnswerRule = Literal["answer", "squad"]

# Scripts written without spaces beside Han: Thai and Lao, Burmese, Khmer, kana.
_BLOCKS = ((0x0E00, 0x0EFF), (0x1000, 0x109F), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F), (0x1780, 0x17FF), (0x3040, 0x30FF),
           (0x31F0, 0x31FF))  # fmt: skip
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"


def _in_blocks(kind: str) -> str:
    found = (chr(code) for low, high in _BLOCKS for code in range(low, high + 1))
    return "".join(char for char in found if unicodedata.category(char)[0] == kind)


# With the vowel signs and tone marks that stand on it.
_CHARACTER = re.compile(f"[{_HAN}{_in_blocks('L')}][{_in_blocks('M')}]*")

_SELECTORS = (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0), *range(0x180B, 0x180E), 0x034F)
_OTHER_VALUES = ("<super>", "<sub>", "<fraction>")
_ACCENT_ALONE = "<compat> 0020"


class _Table(dict[int, str]):
    """A table for `str.translate`, filled as characters are met."""

    def __init__(self, form: Callable[[str], str]) -> None:
        self._form = form

    def __missing__(self, code: int) -> str:
        self[code] = form = self._form(chr(code))
        return form


def _shown(char: str) -> str:
    return "" if unicodedata.category(char) == "Cf" or ord(char) in _SELECTORS else char


def _cutting(punctuation: Callable[[str], str]) -> _Table:
    """The table that leaves words and spaces, and `punctuation` of each mark and symbol."""

    def form(char: str) -> str:
        if not unicodedata.decomposition(char).startswith((*_OTHER_VALUES, _ACCENT_ALONE)):
            usual = unicodedata.normalize("NFKC", char).lower()
            if usual != char:
                return "".join(map(form, usual))
        # By category, as str.isalnum and \w leave out the vowel signs of Indic scripts.
        category = unicodedata.category(char)
        if category[0] in "PS":
            return punctuation(char)
        return " " if category[0] == "Z" or category == "Cc" else _shown(char)

    return _Table(form)


def _mark(char: str) -> str:
    """A mark or symbol of an answer: itself where it may make a value, else an apostrophe."""
    category = unicodedata.category(char)
    if category == "Pd" or char == "\u2212":
        return "-"
    if char in "\u2044\u2215":
        return "/"
    return char if category in ("Sm", "Sc") or char in ".,/*&^#%\u2030\u066a" else "'"


_SHOWN = _Table(_shown)
_WORDS = _cutting(lambda char: " ")
_SQUAD = _cutting(lambda char: "")
_ANSWER = _cutting(_mark)

_WORD = r"[^\s'.,/*&^#-]"
_GROUPS_OF_DIGITS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!,?\d)")
_MARK = re.compile(
    rf"""['.,/*&^#-](?:
        (?P<value>
            (?:(?<=\d[.])|(?<=[.])(?<![\w.][.]))(?=\d)           # 3.14 and .5
            | (?<=-)(?=[^\w\s]?[.]?\d) | (?<=\d-)(?={_WORD})      # -5, -$5, x-5, 5-x
            | (?<={_WORD}[/*&^])(?={_WORD}) | (?<={_WORD}[#])      # 1/2, x^2, R&D, C#, but not **bold**
            | (?<=\A[/*&^#-])\Z                                   # an operator alone
        )
        | (?P<beside_digit>(?<=\d.)|(?=\d))
        |
    )""",
    re.VERBOSE,
)
_ARTICLES = {"a", "an", "the"}


def shown(text: str) -> str:
    """Text in one spelling, as it looks: composed, without characters that do not show."""
    return text if text.isascii() else unicodedata.normalize("NFC", text.translate(_SHOWN))


def spaced(text: str) -> str:
    """`shown`, with spaces around each character of a script that is written without them."""
    return text if text.isascii() else _CHARACTER.sub(r" \g<0> ", shown(text))


def words(text: str) -> list[str]:
    """Lower-case words without punctuation; scripts without spaces (Chinese, Japanese, Thai, ...) by character."""
    return spaced(text.lower().translate(_WORDS)).split()


def answer_words(text: str, rule: AnswerRule, language: str) -> list[str]:
    """What counts of a short answer.

    By the rule of SQuAD (arXiv 1606.05250) case and punctuation vanish, and in English ("en") articles. The rule
    "answer" keeps what makes a value: signs, decimal points, fractions and symbols, so that -5 is not 5, 3.14 not 314,
    1/2 not 12, C++ not C. Nothing beside a digit closes up. In English 1,000 is 1000, and an article is one before a
    word only: the answer "A" is not empty.
    """
    english = language == "en"
    if rule == "squad":
        found = spaced(text.lower().translate(_SQUAD)).split()
        return [word for word in found if word not in _ARTICLES] if english else found
    marked = text.lower().translate(_ANSWER).strip()
    if english and "," in marked:
        marked = _GROUPS_OF_DIGITS.sub(lambda number: number[0].replace(",", ""), marked)
    if "%" in marked:
        marked = re.sub(r"(?<=\d)\s+(?=%)", "", marked)
    kept = _MARK.sub(_as_it_counts, marked)
    found = spaced(kept).split()
    return [word for word in found[:-1] if word not in _ARTICLES] + found[-1:] if english else found


def _as_it_counts(mark: re.Match[str]) -> str:
    if mark["value"] is not None:
        return mark[0]
    return "" if mark["beside_digit"] is None else " "
