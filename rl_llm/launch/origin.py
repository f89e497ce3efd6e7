"""Digests of what a run is made from beside its config: its rows, the files of its model, the code of its rewards.

They are taken in the driver and stand in every checkpoint, so that a resumed run knows what has changed since.
"""

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from types import CodeType
from typing import Any

from huggingface_hub import try_to_load_from_cache

from rl_llm.config import RunConfig
from rl_llm.policies.loading import adapter_base
from rl_llm.rewards import resolve
from rl_llm.tasks import Task
from rl_llm.trainer.state import Origin

# What of a model's folder makes the policy. Others, such as a README or an optimiser's state, may come and go.
MODEL_FILES = (
    "*.safetensors", "pytorch_model*.bin", "config.json", "adapter_config.json", "generation_config.json", "*.py",
    "*token*", "*.model", "vocab*", "merges.txt", "chat_template*",
)  # fmt: skip

# A file above BLOCKS x BLOCK bytes is sampled: tens of gigabytes would take minutes to read, and whoever trains or
# merges a model changes its weights all over.
BLOCK, BLOCKS = 2**18, 2**8


def origin_of(config: RunConfig, task: Task, functions: Mapping[str, Callable[..., Any]]) -> Origin:
    """What a run is made from; `functions` as for `Component`, by component."""
    return Origin(
        rows=task.digest(),
        model={} if config.policy.model is None else model_digests(config.policy.model),
        code={name: code_digest(spec.use, functions.get(name)) for name, spec in config.measured.items()},
    )


def model_digests(model: str) -> dict[str, str]:
    """A digest of each file that makes a model: of its folder, or of what is cached of it from the Hub.

    The files of the model that an adapter was made for are among them, under `base/`.
    """
    base = adapter_base(model)
    below = {} if base is None else {f"base/{name}": digest for name, digest in model_digests(base).items()}
    folder = Path(model)
    if not folder.is_dir():
        cached = try_to_load_from_cache(model, "config.json")
        if not isinstance(cached, str):
            return below
        folder = Path(cached).parent
    files = sorted(path for path in folder.iterdir() if path.is_file())
    own = {path.name: file_digest(path) for path in files if any(fnmatch(path.name, kind) for kind in MODEL_FILES)}
    return own | below


def file_digest(path: Path) -> str:
    """Of a file's size and bytes; of a large file's size and `BLOCKS` blocks from its beginning to its end."""
    size = path.stat().st_size
    starts = list(range(0, size, BLOCK))
    if len(starts) > BLOCKS:
        starts = [(size - BLOCK) * number // (BLOCKS - 1) for number in range(BLOCKS)]
    digest = _hash(str(size))
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(BLOCK))
    return digest.hexdigest()


def code_digest(use: str, given: Callable[..., Any] | None = None) -> str:
    """Of a component's code: the file it stands in; given in Python, its own text; of a built-in one, the version.

    Empty where there is neither text nor code of Python's.
    """
    target: Any = resolve(use) if given is None else given
    while isinstance(target, functools.partial):
        target = target.func
    target = inspect.unwrap(target)
    if not (inspect.isclass(target) or inspect.isroutine(target)):
        target = type(target)
    if (target.__module__ or "").startswith("rl_llm.rewards."):
        return f"rl-llm {version('rl-llm')}"
    try:
        file = inspect.getsourcefile(target) if given is None else None
        return file_digest(Path(file)) if file else _hash(inspect.getsource(target)).hexdigest()
    except (OSError, TypeError):
        code = getattr(target, "__code__", None)
        return _hash(_bytecode(code)).hexdigest() if code else ""


def _bytecode(code: CodeType) -> str:
    inner = [_bytecode(const) if isinstance(const, CodeType) else repr(const) for const in code.co_consts]
    return repr((code.co_code, code.co_names, inner))


def _hash(text: str) -> Any:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16)
