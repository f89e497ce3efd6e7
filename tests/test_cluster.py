"""Ray: joining a cluster or starting one, and room in it for a run's actors."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny

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


def test_a_slot_has_room_for_the_trainers_process_before_that_for_its_actors(ray_session: None) -> None:
    import ray

    from rl_llm.runtime.cluster import HEAD, Placement, slot_bundles, slots_that_fit

    assert slot_bundles(ResourcesConfig()) == [{"CPU": 1}]
    gpus = ResourcesConfig(num_rollout_workers=1, num_gpus_per_rollout_worker=0.5, num_gpus_per_learner=1)
    assert slot_bundles(gpus) == [{"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 0.5}]
    assert slots_that_fit(gpus) == 0
    resources = ResourcesConfig(num_rollout_workers=1, num_learners=1, num_cpus_per_learner=0.5)
    assert slot_bundles(resources) == [{"CPU": 0.1}, {"CPU": 0.5}, {"CPU": 1}]
    assert slots_that_fit(resources) == 2

    slot = Placement(resources, slot=True)
    inside = Placement(resources, slot.group)
    assert inside.bundle("learner", 0)["scheduling_strategy"].placement_group_bundle_index == 1
    assert slot.bundle(HEAD, 0)["num_cpus"] == 0.1
    inside.remove()
    assert ray.util.placement_group_table(slot.group)["state"] == "CREATED"
    slot.remove()
    with pytest.raises(UserError, match=r"needs 1 x {CPU: 1, GPU: 1}.*missing GPU: 1. Lower resources.num_gpus_per_l"):
        Placement(ResourcesConfig(num_gpus_per_learner=1, wait_s=0.1), slot=True)


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


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What `ray.init` is asked for, in place of starting one."""
    import ray

    asked: dict[str, Any] = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **given: asked.update(given))
    return asked


def test_a_local_ray_keeps_to_the_limit_of_the_container(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Ray itself makes of it: it would refuse a store that leaves nothing for workers."""
    from ray._private.resource_and_label_spec import ResourceAndLabelSpec

    from rl_llm.runtime import memory
    from rl_llm.runtime.cluster import connect

    limit = 3 * 2**30
    monkeypatch.setattr(memory, "memory_limit", lambda: limit)
    monkeypatch.setattr("ray._common.utils.get_system_memory", lambda: limit)
    monkeypatch.setattr("ray._private.utils.estimate_available_memory", lambda: limit // 2)
    connect(ResourcesConfig(num_rollout_workers=1))
    spec = ResourceAndLabelSpec(
        asked["num_cpus"], 0, memory=asked["_memory"], object_store_memory=asked["object_store_memory"]
    )
    spec._resolve_memory_resources(None)
    assert spec.memory + spec.object_store_memory <= limit


@pytest.mark.parametrize(
    ("variable", "folder", "expected"),
    [
        ("TMPDIR", "/" + "scratch" * 10, "/tmp/ray"),
        ("RAY_TMPDIR", "/" + "ö" * 30, "/tmp/ray"),
        ("TMPDIR", "/scratch", None),
    ],
)
def test_a_long_tmpdir_gives_way_to_a_shorter_one(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, variable: str, folder: str, expected: str | None
) -> None:
    from rl_llm.runtime.cluster import connect

    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(variable, folder)
    connect(ResourcesConfig())
    assert asked["_temp_dir"] == expected
    if expected:
        monkeypatch.setattr(os, "access", lambda *of: False)
        with pytest.raises(UserError, match=r"set RAY_TMPDIR to a folder of up to \d\d$"):
            connect(ResourcesConfig())


def test_a_ray_of_our_own_needs_no_home(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray keeps the token of a cluster there."""
    from rl_llm.runtime.cluster import connect

    monkeypatch.setenv("RAY_AUTH_TOKEN", "")  # so that it is put back
    for name in [name for name in os.environ if name.startswith("RAY_AUTH_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    connect(ResourcesConfig())
    assert "RAY_AUTH_TOKEN" not in os.environ
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    connect(ResourcesConfig())
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64


def test_a_ray_that_does_not_start_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    from rl_llm.runtime.cluster import connect

    def fail(**given: Any) -> None:
        raise TimeoutError("The node timed out\n  and more")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(
        UserError, match=r"^Ray cannot be started on this machine: The node timed out and more; mend"
    ) as it:
        connect(ResourcesConfig(address="local"))
    assert "resources.num_learners=0" in str(it.value)


@pytest.mark.parametrize("kind", ["AuthenticationError", "ConnectionError"])
def test_a_cluster_that_asks_for_a_token_says_how_to_give_it(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Ray 2.60 says no more than that it could not connect."""
    import ray

    from rl_llm.runtime import cluster

    def fail(**given: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(cluster, "_probe", lambda address: None)
    error = getattr(ray.exceptions, kind, ConnectionError)("Failed to connect")
    message = "Failed to connect.*; something listens there: if it asks for a token, set RAY_AUTH_MODE=token and"
    with pytest.raises(UserError, match=message):
        cluster.connect(ResourcesConfig(address="head:6379"))


# What Ray 2.60 says, its identifiers shortened.
SAID = {
    "memory": (
        "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.2, ID: 5ee0) "
        "was 22.40GB used / 23.54GB limit (0.951572)\nOOM kill reason: Memory usage 24051816652B exceeded threshold of "
        "24012260556B (95.0% of 25276063744B limit)\nTop 10 memory users: PID\tMEM(GB)\tCOMMAND\n22\t9.9\tray::_Host\n"
        "Refer to the documentation on how to address the out of memory issue: https://docs. Consider more memory."
    ),
    "crash": (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: _Host\n\tpid: 23518\n"
        "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: "
        "Worker unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the "
        "process was killed by the OOM killer due to high memory usage, (2) ray stop --force was called"
    ),
    "node": (
        "The actor died unexpectedly before finishing this task.\n\tclass_name: _Host\n"
        "The actor died because its node has died. Node Id: 62f0\n"
        "\tthe actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats"
    ),
    "object": (
        "Failed to retrieve object 00ff. To see information about where this ObjectRef was created in Python, set\n\n"
        "All copies of 00ff have been lost due to node failure. Check cluster logs (`/tmp/ray`) for more information."
    ),
}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("memory", "Ray killed it because its node ran low on memory, 22.40GB of 23.54GB used; start fewer workers"),
        ("crash", "Worker unexpectedly exits with a connection error code 2. End of file."),
        (
            "node",
            "the actor's node was terminated unexpectedly: health check failed due to missing too many heartbeats",
        ),
        ("object", "All copies of 00ff have been lost due to node failure."),
    ],
)
def test_what_is_said_of_a_lost_worker_is_the_cause_and_no_advice(kind: str, expected: str) -> None:
    from ray.exceptions import OutOfMemoryError

    from rl_llm.runtime.actor import reason_of

    line = reason_of(OutOfMemoryError(SAID[kind]))
    assert line.endswith(expected)
    assert "\n" not in line


def test_the_warm_start_waits_for_room_as_long_as_it_is_told_and_says_what_is_missing(
    ray_session: None, tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rl_llm.launch.preflight import make_plan
    from rl_llm.launch.warm_start import ensure_base

    monkeypatch.setenv("RL_LLM_CACHE", str(tmp_path / "cache"))
    config = tiny_run.config(
        warm_start={"supervised_steps": 1, "target": "demonstration"},
        resources={"num_learners": 1, "num_gpus_per_learner": 1, "wait_s": 0.1, "num_reward_workers": 50},
    )
    with pytest.raises(
        UserError, match=r"within 0.1 s: needs 1 x {CPU: 1, GPU: 1}.* missing GPU: 1\. Lower resources.num_l"
    ):
        ensure_base(config, make_plan(config, {}).task, print)
    assert not (tmp_path / "cache").exists()


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
