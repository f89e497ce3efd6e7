import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
