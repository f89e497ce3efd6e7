"""Ray: joining a cluster or starting one, and room in it for a run's actors."""

import os
import socket
import subprocess
import sys
from contextlib import closing

import pytest

from rl_llm.config import ResourcesConfig
from rl_llm.errors import UserError
from rl_llm.runtime.pool import Pool


def test_a_placement_gives_every_replica_its_bundle_and_takes_all_back(ray_session: None) -> None:
    import ray

    from rl_llm.runtime.cluster import Placement

    resources = ResourcesConfig(num_rollout_workers=2, num_reward_workers=1, num_cpus_per_reward_worker=0.5)
    placement = Placement(resources)
    assert placement.bundle("rollout_worker", 1)["num_cpus"] == 1
    from rl_llm.runtime.actor import Actor

    with closing(Pool("reward", list, lambda index: Actor(1, placement.bundle("reward_worker", index)), 1)) as pool:
        assert pool.call("count", 2) == 0
    placement.remove()
    again = Placement(ResourcesConfig(num_learners=1, num_cpus_per_learner=ray.cluster_resources()["CPU"]))
    again.remove()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            {"num_gpus_per_rollout_worker": 1},
            r"needs 3 x {CPU: 1, GPU: 1}.*missing GPU: 3\. Lower resources.num_rollout_workers",
        ),
        ({"num_cpus_per_rollout_worker": 2}, r"needs 3 x {CPU: 2}, the cluster has 4 CPU .*missing CPU"),
    ],
)
def test_what_cannot_be_placed_is_named(ray_session: None, asked: dict[str, float], message: str) -> None:
    from rl_llm.runtime.cluster import Placement

    with pytest.raises(UserError, match=message):
        Placement(ResourcesConfig(num_rollout_workers=3, wait_s=1, **asked))


def test_connect_uses_the_ray_that_is_there(ray_session: None) -> None:
    from rl_llm.runtime.cluster import connect

    assert not connect(ResourcesConfig(num_rollout_workers=1))


def test_connect_joins_a_cluster_by_address(ray_session: None) -> None:
    import ray

    code = (
        "import ray; from rl_llm.runtime.cluster import connect; from rl_llm.config import ResourcesConfig;"
        "assert connect(ResourcesConfig()); assert ray.cluster_resources()['CPU'] == 4"
    )
    address = ray.get_runtime_context().gcs_address
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "RAY_ADDRESS": address})


def test_a_local_ray_makes_room_for_more_actors_than_cores() -> None:
    code = (
        "from rl_llm.runtime.cluster import connect, Placement; from rl_llm.config import ResourcesConfig; import os;"
        "many = ResourcesConfig(address='local', num_rollout_workers=os.cpu_count() + 3, wait_s=20);"
        "assert connect(many); Placement(many)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_address_nobody_answers_at_is_a_line_to_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from rl_llm.runtime.cluster import connect

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UserError, match=f"cannot join the Ray cluster at '{address}' .resources.address"):
            connect(ResourcesConfig(address=address))
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    with pytest.raises(UserError, match=r"RAY_ADDRESS.*host:port"):
        connect(ResourcesConfig())
