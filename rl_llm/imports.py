"""Functions of the user's own, named `package.module:function` in a config."""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rl_llm.errors import UserError
from rl_llm.process import Apart

_beside: list[str] = []


def look_in(*folders: str | Path) -> None:
    """Have modules of the user's looked for in these folders, before those that were named earlier."""
    _beside[:] = dict.fromkeys([*(str(Path(folder).absolute()) for folder in folders), *_beside])


def places() -> list[str]:
    """The folders that modules of the user's are looked for in first: those of configs, and the current one."""
    return list(dict.fromkeys([*_beside, os.getcwd()]))


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
    folders = places()
    # An installed command does not have the user's folders on the path.
    sys.path[:0] = folders
    try:
        with Apart(f"{what} {path!r}, when imported,").entered():
            found = importlib.import_module(module)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            reason += f" in {' or '.join(folders)}, nor where Python looks"
        raise UserError(f"{what} {path!r}: cannot import {module!r}: {reason}") from error
    finally:
        for folder in folders:
            sys.path.remove(folder)
    # The module may import its neighbours later, when called; at the end they hide nobody else's.
    file = getattr(found, "__file__", None)
    home = next((folder for folder in folders if file and Path(file).is_relative_to(folder)), None)
    if home is not None and home not in sys.path:
        sys.path.append(home)
    return found
