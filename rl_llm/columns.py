"""Columns of the data: values of any kind in Arrow, each row's as it was read.

A column whose values have one type that Arrow has too, or are lists of one, is a column of that type. Any other, of
objects, nested lists, or whole numbers beside fractions, has the type `JSON` (Arrow's own, text underneath) with each
row's value by itself: other types would turn 7 beside 0.5 into 7.0, and give each object the keys of all.
"""

import contextlib
import json
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rl_llm.values import plain, to_json

JSON = pa.json_(pa.string())

_CLASSES = (bool, int, float, str, list, dict)
_SMALL_FLOATS = {pa.float16(): np.float16, pa.float32(): np.float32}


def values_of(column: pa.ChunkedArray) -> list[Any]:
    """The value of each row; None where there is none."""
    values: list[Any] = column.to_pylist(maps_as_pydicts="lossy")
    return values if _is_simple(column.type) else [_value(value, column.type) for value in values]


def column_of(values: list[Any]) -> pa.Array:
    """A column of values as `plain` makes them.

    Raises:
        TypeError, ValueError, RecursionError: a value that no column can hold.
    """
    if _of_one_type(values):
        # Whole numbers of more than 64 bits, and what only JSON may have a form for, do not fit.
        with contextlib.suppress(pa.ArrowException, OverflowError):
            return pa.array(values)
    return pa.array([None if value is None else to_json(value) for value in values], JSON)


def normal_column(column: pa.ChunkedArray) -> pa.ChunkedArray | pa.Array:
    """A column of Parquet, of a data set or of a frame as `column_of` would make it.

    Dictionaries, views, and large and fixed-size lists become text and lists. Floats of 16 and 32 bits become the
    64-bit ones that their shortest decimals name, and what is no finite number null. An object keeps all keys of its
    type.
    """
    for kind in [_normal(column.type, small_float) for small_float in (pa.string(), pa.float64())]:
        if kind != column.type and _is_simple(kind):
            column = column.cast(kind)
    if _is_simple(column.type):
        flat = pc.list_flatten(column) if pa.types.is_list(column.type) else column
        if not pa.types.is_floating(flat.type) or pc.all(pc.is_finite(flat)).as_py():
            return column
    return column_of([plain(value) for value in values_of(column)])


def _of_one_type(values: list[Any]) -> bool:
    classes = {_class(value) for value in values if value is not None}
    if classes == {list}:
        classes = {_class(item) for value in values if value is not None for item in value if item is not None}
    return len(classes) <= 1 and not classes & {list, dict}


def _class(value: Any) -> object:
    if isinstance(value, Decimal):
        return value.as_tuple().exponent  # decimals of one column have as many digits as the longest
    return next((kind for kind in _CLASSES if isinstance(value, kind)), type(value))


def _is_simple(kind: pa.DataType) -> bool:
    """Whether a column has plain values, or plain lists of such."""
    kind = kind.value_type if pa.types.is_list(kind) else kind
    odd = (pa.types.is_nested, pa.types.is_dictionary, pa.types.is_run_end_encoded, _is_extension)
    return kind not in _SMALL_FLOATS and not any(is_one(kind) for is_one in odd)


def _is_extension(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.BaseExtensionType)


def _is_list(kind: pa.DataType) -> bool:
    listed = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view)
    return any(is_one(kind) for is_one in (*listed, pa.types.is_large_list_view))


def _normal(kind: pa.DataType, small_float: pa.DataType) -> pa.DataType:
    """The type to cast to. 32-bit floats go by way of text, which is their shortest decimal."""
    if pa.types.is_dictionary(kind):
        return _normal(kind.value_type, small_float)
    if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return pa.binary()
    if _is_list(kind):
        return pa.list_(_normal(kind.value_type, small_float))
    return small_float if pa.types.is_float32(kind) else kind


def _value(value: Any, kind: pa.DataType) -> Any:
    """A value of a type that Python has no word for, at any depth."""
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if kind in _SMALL_FLOATS:
        return plain(_SMALL_FLOATS[kind](value))
    if _is_list(kind):
        return [_value(item, kind.value_type) for item in value]
    if pa.types.is_struct(kind):
        return {field.name: _value(value[field.name], field.type) for field in kind}
    if pa.types.is_map(kind):
        return {key: _value(item, kind.item_type) for key, item in value.items()}
    return value
