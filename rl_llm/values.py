"""Values of the data as Python has them, and their form as text and as strict JSON."""

import base64
import datetime
import json
import math
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """The value as rewards and JSON have it; what has no such form stays as it is.

    Numbers and arrays of numpy become Python's, a tuple a list. What is no finite number, or pandas' mark of a missing
    value, becomes None. A float of 16 or 32 bits becomes the one that its shortest decimal names: 0.1 stays 0.1.
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, np.ndarray | np.generic) and not isinstance(value, str | bytes):
        return plain(_python(value))
    missing = type(value).__name__ in ("NAType", "NaTType") or (isinstance(value, Decimal) and not value.is_finite())
    return None if missing else value


def _python(value: Any) -> Any:
    kind = value.dtype.kind
    if kind == "f" and value.dtype.itemsize != 8:
        value = value.astype(str).astype(np.float64)
    elif kind in "mM" and np.datetime_data(value.dtype)[0] == "ns":  # would become a bare number
        value = value.astype(f"{kind}8[us]")
    return value.tolist()


def to_json(value: Any) -> str:
    """Strict JSON on one line, of the value as `plain` makes it.

    Dates and times are ISO 8601, bytes Base64, decimal numbers (`Decimal`, which JSON would round), durations and paths
    their text. Raises `TypeError` for what has no form.
    """
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False, default=_as_json_text)


def _as_json_text(value: Any) -> str:
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, Decimal | datetime.timedelta | uuid.UUID | Path):
        return str(value)
    raise TypeError(f"{kind_of(value)} has no form in JSON")


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    if isinstance(value, bool):
        return "true/false"
    if isinstance(value, int | float | Decimal):
        return "a number"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    return "null" if value is None else f"a {type(value).__name__}"


def is_scalar(value: Any) -> bool:
    """Whether a value is one text, number, truth value, date or the like; None is."""
    return not isinstance(value, list | tuple | dict | bytes)


def as_text(value: Any) -> str:
    """A scalar as prompts and references show it."""
    # Frames and Parquet have whole numbers beside a gap as floats; 7 must not become 7.0 and change its side.
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return str(int(value) if whole else value)


def texts_of(value: Any) -> list[str]:
    """The texts of a column that holds one or several a row: references, targets. None has none.

    A row has a text, a number, a list of these with gaps allowed, or SQuAD's object `{"text": [...], "answer_start":
    [...]}`, which stands for its texts. Raises `ValueError` for anything else.
    """
    if isinstance(value, dict) and value.keys() == {"text", "answer_start"}:
        value = value["text"]
    several = value if isinstance(value, list | tuple) else [value]
    for one in several:
        if not is_scalar(one):
            where = " in a list" if several is value else ""
            raise ValueError(
                f'{kind_of(one)}{where} ({one!r:.60}), where a text, a number, a list of these or {{"text": [...], '
                f'"answer_start": [...]}} is needed'
            )
    return [as_text(one) for one in several if one is not None]
