"""Functions of the user's own, named `package.module:function` in a config."""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rl_llm.errors import UserError
from rl_llm.process import Apart


def import_function(path: str, what: str) -> Callable[..., Any]:
    """The function or class at `package.module:function`; `what` it is, such as "reward", is for messages.

    Raises:
        UserError: no such module or function.
    """
    module, _, attribute = path.partition(":")
    found = getattr(_import(module, path, what), attribute, None)
    if found is None:
        raise UserError(f"{what} {path!r}: module {module!r} has no {attribute!r}")
    if not callable(found):
        raise UserError(f"{what} {path!r} is {type(found).__name__}, not a function or class")
    return found


def _import(module: str, path: str, what: str) -> Any:
    here = os.getcwd()
    # An installed command does not have the user's folder on the path.
    sys.path.insert(0, here)
    try:
        with Apart(f"{what} {path!r}, when imported,").entered():
            found = importlib.import_module(module)
    except Exception as error:
        raise UserError(f"{what} {path!r}: cannot import {module!r}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
    # The module may import its neighbours later, when called; at the end they hide nobody else's.
    file = getattr(found, "__file__", None)
    if file and Path(file).is_relative_to(here) and here not in sys.path:
        sys.path.append(here)
    return found
