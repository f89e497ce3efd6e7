"""Where things run: replicas, the pool over them, room in a cluster, weights on their way. Knows nothing of RL."""

from collections.abc import Iterator
from contextlib import contextmanager

from rl_llm.config import ResourcesConfig
from rl_llm.process import own_modes


@contextmanager
def connected(resources: ResourcesConfig) -> Iterator[None]:
    """What a run needs: torch's own modes, and Ray where there are workers; whatever was there before stays."""
    with own_modes():
        if resources.uses_ray:
            with _ray(resources):
                yield
        else:
            yield


@contextmanager
def _ray(resources: ResourcesConfig) -> Iterator[None]:
    import ray

    from rl_llm.runtime.cluster import connect, send_tables_as_ipc

    started = connect(resources)
    send_tables_as_ipc()
    try:
        yield
    finally:
        if started:
            ray.shutdown()
