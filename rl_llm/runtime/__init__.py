"""Where things run: replicas, the pool over them, room in a cluster, weights on their way. Knows nothing of RL."""

from collections.abc import Iterator
from contextlib import contextmanager

from rl_llm.config import ResourcesConfig


@contextmanager
def connected(resources: ResourcesConfig, slots: int = 0) -> Iterator[None]:
    """Ray for as long as a config with workers needs it, or for so many slots; what was there before stays."""
    if not (resources.uses_ray or slots):
        yield
        return
    import ray

    from rl_llm.runtime.cluster import connect, send_tables_as_ipc

    started = connect(resources, slots)
    send_tables_as_ipc()
    try:
        yield
    finally:
        if started:
            ray.shutdown()
