import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", type=int, default=1, help="runs of each test of learning, each with a seed of its own")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("learning") and "seed" in metafunc.fixturenames:
        metafunc.parametrize("seed", range(metafunc.config.getoption("seeds")))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray for all tests that need actors; four logical CPUs, whatever the machine has."""
    import ray

    ray.init(
        address="local",
        # Actors find the modules of the tests, as pytest does.
        runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}},
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
    )
    yield
    ray.shutdown()


@dataclass(frozen=True)
class Tiny:
    """A tiny policy's folder, a task file to go with it, and an undisturbed run of 6 steps in one process."""

    policy: Path
    data: Path
    undisturbed: Path

    def config(self, **sections: Any) -> Any:
        import tiny

        return tiny.config(self.policy, self.data, **sections)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    import tiny

    folder = tmp_path_factory.mktemp("tiny")
    made = Tiny(tiny.build_policy(folder), tiny.write_task(folder / "task.jsonl"), folder / "undisturbed")
    tiny.train(made.config(), made.undisturbed)
    return made


@pytest.fixture(scope="session")
def finished_search(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a synthetic search that has come to its end; to be read only."""
    from search_factory import make_search

    return make_search(tmp_path_factory.mktemp("searches") / "finished", predicted=True, fails=("t04",))


class Said(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture
def command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_run: Tiny
) -> Command:
    """Runs `rl-llm` with arguments in a folder that has a config, `own.yaml`, with its `task.jsonl` and `model`."""
    import yaml

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "task.jsonl").write_bytes(tiny_run.data.read_bytes())
    (tmp_path / "model").symlink_to(tiny_run.policy)
    (tmp_path / "own.yaml").write_text(
        yaml.safe_dump(tiny_run.config(task={"data": "task.jsonl"}).model_dump(mode="json"))
    )

    def run(*arguments: object) -> Said:
        from rl_llm import cli

        monkeypatch.setattr(sys, "argv", ["rl-llm", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return Said(int(caught.value.code or 0), *capsys.readouterr())

    return run


def refused(command: Command, *arguments: object) -> str:
    """The one or two lines with which a command is refused before anything has started."""
    before = sorted(Path().rglob("*"))
    said = command(*arguments)
    assert said.code == 2
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert len(said.err.splitlines()) <= 2
    assert "Traceback" not in said.err
    assert sorted(Path().rglob("*")) == before
    return said.err
