"""How much memory there is: the machine's, a container's, a batch job's."""

from pathlib import Path

import pytest

from rl_llm.runtime import memory
from rl_llm.runtime.memory import memory_limit, physical_memory, ray_memory

GIB = 2**30


V1, V2 = "memory.limit_in_bytes", "memory.max"


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/", {V2: 3 * GIB}, 3 * GIB),
        ("0::/", {V2: "max"}, None),
        ("0::/slurm/job/step", {f"slurm/job/{V2}": 2 * GIB, f"slurm/job/step/{V2}": "max"}, 2 * GIB),
        ("0::/../outside", {V2: 3 * GIB}, 3 * GIB),
        ("5:cpu:/a\n4:memory:/docker/x\n0::/", {f"memory/{V1}": 3 * GIB}, 3 * GIB),
        ("4:cpu,memory:/a", {f"memory/{V1}": 9223372036854771712, f"memory/a/{V1}": GIB}, GIB),
        ("", {}, None),
    ],
)
def test_the_limit_is_the_least_of_those_that_hold(
    tmp_path: Path, own: str, limits: dict[str, object], expected: int | None
) -> None:
    for path, limit in limits.items():
        file = tmp_path / "cgroup" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{limit}\n")
    (tmp_path / "own").write_text(f"{own}\n" if own else "")
    assert memory_limit(tmp_path / "cgroup", tmp_path / "own") == (expected or physical_memory())


@pytest.mark.parametrize(
    ("limit", "physical", "expected"),
    [
        (3 * GIB, 23 * GIB, (3 * GIB // 5, 3 * GIB - 3 * GIB // 5)),
        (23 * GIB, 23 * GIB, (23 * GIB // 5, 23 * GIB - 23 * GIB // 5)),
        (100 * GIB, 900 * GIB, (10**10, 100 * GIB - 10**10)),
        (900 * GIB, 900 * GIB, (None, None)),
    ],
)
def test_ray_takes_what_the_container_has(
    monkeypatch: pytest.MonkeyPatch, limit: int, physical: int, expected: tuple[int | None, int | None]
) -> None:
    monkeypatch.setattr(memory, "memory_limit", lambda: limit)
    monkeypatch.setattr(memory, "physical_memory", lambda: physical)
    assert ray_memory() == expected
