"""What a checkpoint holds, and that it is whole: written aside, synced, checksummed, renamed.

`checkpoints/step-000020/` has the learner's tensors (safetensors), `state.json` and `manifest.json` with the SHA-256 of
every file. Nothing of it is unpickled.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rl_llm.files import sync

MANIFEST = "manifest.json"


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def by_step(folder: Path, suffix: str = "") -> dict[int, Path]:
    """What a run keeps in a folder, by step in order. Only exact names are a run's: any other is somebody's copy."""
    found = {}
    for path in folder.glob(f"step-*{suffix}"):
        digits = path.name.removeprefix("step-").removesuffix(suffix)
        if digits.isdecimal() and path.name == step_name(int(digits)) + suffix:
            found[int(digits)] = path
    return dict(sorted(found.items()))


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `folder` once it is complete and on disk. Else `folder` is as it was."""
    aside, before = (folder.with_name(f".{folder.name}.{what}") for what in ("partial", "before"))
    for left in (aside, before):
        shutil.rmtree(left, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        manifest = {str(path.relative_to(aside)): _digest(path) for path in files}
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in [*files, aside / MANIFEST, aside]:
            sync(path)
    except BaseException:
        # On a full disk, what is of no use takes the room of what would be.
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(before)
    aside.rename(folder)
    sync(folder.parent)
    shutil.rmtree(before, ignore_errors=True)


def damage(folder: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return "its manifest is missing or broken"
    for name, digest in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if _digest(path) != digest:
            return f"{name} is damaged"
    return None


def find(folder: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest whole checkpoint in `folder`, and each newer one that was refused with the reason."""
    refused: list[tuple[Path, str]] = []
    for path in reversed(by_step(folder).values()):
        problem = damage(path)
        if problem is None:
            return path, refused
        refused.append((path, problem))
    return None, refused


def prune(folder: Path, keep: int) -> None:
    """Leave the `keep` newest."""
    for path in list(by_step(folder).values())[:-keep]:
        shutil.rmtree(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
