"""The house: imports lead downwards only, and nowhere in a circle."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1] / "rl_llm"
# From the roof down. What stands on a line may import from the lines below it and, without a circle, from its own.
FLOORS = [
    ["__init__", "cli", "api"],
    ["search"],
    ["launch"],
    ["trainer"],
    ["learner", "rollout", "rewards", "runs"],
    ["policies", "algorithms", "mixture", "controllers", "tasks", "runtime"],
    ["config"],
    ["table", "columns", "values", "groups", "rng", "imports", "files", "errors", "process"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported(file: Path) -> Iterator[str]:
    """The modules of ours that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "rl_llm":
            module = str(node.module)
            for name in node.names:
                path = ROOT.parent / Path(*module.split("."), name.name)
                deeper = path.is_dir() or path.with_suffix(".py").is_file()
                yield f"{module}.{name.name}" if deeper else module
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "rl_llm")


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str:
    return [*module.split("."), "__init__"][1]


IMPORTS = {module_of(file): sorted(set(imported(file))) for file in ROOT.rglob("*.py")}


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """A way round from one node to itself, if there is one."""
    done: set[str] = set()

    def follow(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            for target in sorted(arrows.get(node, ())):
                if found := follow(target, [*path, node]):
                    return found
            done.add(node)
        return []

    return next((found for node in sorted(arrows) if (found := follow(node, []))), [])


def test_every_room_has_its_floor() -> None:
    assert {room(module) for module in IMPORTS} == set(FLOOR)


def test_imports_lead_downwards_only() -> None:
    climbs = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target in targets
        if FLOOR[room(module)] > FLOOR[room(target)]
    ]
    assert climbs == []


def test_no_room_and_no_module_is_in_a_circle() -> None:
    rooms: dict[str, set[str]] = {}
    for module, targets in IMPORTS.items():
        rooms.setdefault(room(module), set()).update({room(target) for target in targets} - {room(module)})
    assert circle(rooms) == []
    assert circle({module: set(targets) for module, targets in IMPORTS.items()}) == []


def test_a_climb_and_a_circle_would_be_seen() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}}) == []
    assert len(IMPORTS) > 80
    assert "rl_llm.config" in IMPORTS["rl_llm.trainer.trainer"]


def test_no_file_has_more_than_500_lines() -> None:
    repository = ROOT.parent
    files = [file for folder in ("rl_llm", "tests", "benchmarks") for file in (repository / folder).rglob("*.py")]
    assert [str(file) for file in files if len(file.read_text().splitlines()) > 500] == []
