"""What a checkpoint holds, and that it is whole: written aside, synced, checksummed, renamed.

`checkpoints/step-000020/` has the learner's tensors (safetensors), `state.json` and `manifest.json` with the SHA-256 of
every file. Nothing of it is unpickled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MANIFEST = "manifest.json"


def step_name(step: int) -> str:
    return f"step-{step:06d}"


@contextmanager
def writing(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name `folder` once it is complete and on disk."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    manifest = {str(path.relative_to(aside)): _digest(path) for path in files}
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in [*files, aside / MANIFEST, aside]:
        _sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    _sync(folder.parent)


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
    for path in sorted(folder.glob("step-*"), reverse=True):
        problem = damage(path)
        if problem is None:
            return path, refused
        refused.append((path, problem))
    return None, refused


def prune(folder: Path, keep: int) -> None:
    """Leave the `keep` newest."""
    for path in sorted(folder.glob("step-*"), reverse=True)[keep:]:
        shutil.rmtree(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
