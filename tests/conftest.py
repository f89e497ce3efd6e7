import logging
from collections.abc import Iterator
from pathlib import Path

import pytest


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
