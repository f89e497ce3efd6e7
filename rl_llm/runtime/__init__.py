"""Where things run: replicas, the pool over them, room in a cluster, weights on their way. Knows nothing of RL."""

from collections.abc import Iterator
from contextlib import contextmanager

from rl_llm.config import ResourcesConfig


@contextmanager
def connected(resources: ResourcesConfig) -> Iterator[None]:
    """Ray for as long as a config with workers needs it; what was there before stays."""
    if not resources.uses_ray:
        yield
        return
    import ray

    from rl_llm.runtime.cluster import connect, send_tables_as_ipc

    started = connect(resources)
    send_tables_as_ipc()
    try:
        yield
    finally:
        if started:
            ray.shutdown()
