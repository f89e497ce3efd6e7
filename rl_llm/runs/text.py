"""Numbers and texts as people read them: in a terminal, a report, a notebook."""

import json
import math
from collections import deque
from collections.abc import Sequence
from typing import Any

BLOCKS = "▁▂▃▄▅▆▇█"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, their columns below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def prompt_text(prompt: str) -> str:
    """A prompt of messages as `role: content` lines; any other as it is."""
    if not prompt.startswith('[{"'):
        return prompt
    try:
        return "\n".join(f"{message['role']}: {message['content']}" for message in json.loads(prompt))
    except (ValueError, KeyError, TypeError):
        return prompt  # a plain prompt that only looks like messages


def one_line(text: str, limit: int = 240) -> str:
    """Text with its line breaks shown as ⏎, cut in the middle to `limit` characters."""
    text = text.replace("\n", " ⏎ ")
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"


def printable(text: str) -> str:
    """Text without control characters: what a policy writes must not steer the terminal."""
    return "".join(char if char.isprintable() or char == "\n" else "�" for char in text)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def short(value: Any) -> str:
    """Three significant digits: 0.513, 18.3, 1.2k; - for no value."""
    if not is_number(value):
        return "-"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


def sparkline(values: "deque[float] | list[float]") -> str:
    """One block a value, scaled between the smallest and the largest."""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    return "".join(BLOCKS[round((value - low) / span * (len(BLOCKS) - 1))] for value in values)
