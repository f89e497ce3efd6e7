"""Ray: a cluster to join or start, and room in it for a run's actors. A run without actors never imports this."""

import logging
import math
import os
import secrets
import socket
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.exceptions
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rl_llm.config import ResourcesConfig
from rl_llm.errors import UserError
from rl_llm.runtime.memory import ray_memory
from rl_llm.runtime.signals import outliving_the_terminal

KINDS = ("learner", "rollout_worker", "reward_worker")
HEAD = "head"
"""The process that holds a trainer, where that has a bundle of its own: in a slot, whose first it is."""
PROBE_S = 10.0
SOCKET_PATH = 107
"""Bytes that the path of a socket may have on Linux."""
SOCKET_NAME = len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")


def connect(resources: ResourcesConfig, slots: int = 0) -> bool:
    """Gives this process a Ray: the one it has, else the cluster at the address, else a local one.

    A local Ray claims at least as many CPUs as the run's actors ask for, or so many slots with one each, so that on a
    laptop they share the cores instead of waiting for room. What actors print goes to the logs under Ray's session
    folder.

    Returns:
        Whether this call made the connection; whoever called then ends it with `ray.shutdown()`.

    Raises:
        UserError: nothing answers at `resources.address` or RAY_ADDRESS, or no Ray can be started here.
    """
    if ray.is_initialized():
        return False
    # The pool looks at the first of two returns; the same error in the second is not news.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    address = resources.address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        bundles = [_bundle(resources, kind) for kind in KINDS for _ in range(_count(resources, kind))]
        _start(sum(bundle["CPU"] for bundle in (slot_bundles(resources) * slots if slots else bundles)), quiet)
        return True
    source = "resources.address" if resources.address else "RAY_ADDRESS"
    refused = f"cannot join the Ray cluster at {address!r} ({source})"
    listens = False
    try:
        _probe(address)
        listens = True
        ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError, ray.exceptions.AuthenticationError) as error:
        remedy = "start it, correct the address, or set resources.address=local for a Ray on this machine"
        # Ray does not say why it was turned away; the library in C++ notes it on standard error.
        if listens and isinstance(error, ConnectionError | ray.exceptions.AuthenticationError):
            remedy = (
                "something listens there: if it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or "
                f"RAY_AUTH_TOKEN_PATH, as on its head node; else see whether it is a Ray {ray.__version__}, as this is"
            )
        raise UserError(f"{refused}: {_in_a_line(error)}; {remedy}") from None
    return True


def _start(cpus: float, quiet: dict[str, Any]) -> None:
    store, rest = ray_memory()
    folder = _short_folder()
    _have_a_token()
    try:
        with outliving_the_terminal():
            ray.init(
                address="local",
                num_cpus=max(os.cpu_count() or 1, math.ceil(cpus)),
                object_store_memory=store,
                _memory=rest,
                _temp_dir=folder,
                include_dashboard=False,
                **quiet,
            )
    except Exception as error:  # of its processes, ports, folders, versions: each fails in a way of its own
        ray.shutdown()
        raise UserError(
            f"Ray cannot be started on this machine: {_in_a_line(error)}; mend that, or set "
            f"{', '.join(f'resources.num_{kind}s=0' for kind in KINDS)} to do without"
        ) from None


def _have_a_token() -> None:
    """Give a Ray of our own the token that it would otherwise make in the home folder, where it could not."""
    home = Path(os.path.expanduser("~"))
    given = any(name.startswith("RAY_AUTH_") for name in os.environ) or (home / ".ray" / "auth_token").is_file()
    if not given and not os.access(home, os.W_OK):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _short_folder() -> str | None:
    """A folder for Ray's sockets where the paths in its own would be too long; None: they are not."""
    own = os.path.join(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray")
    if len(os.fsencode(own)) + SOCKET_NAME <= SOCKET_PATH:
        return None
    if os.access("/tmp", os.W_OK | os.X_OK):
        return "/tmp/ray"
    raise UserError(
        f"Ray's sockets cannot lie in {own}: their paths may have {SOCKET_PATH} bytes; set RAY_TMPDIR to a folder of "
        f"up to {SOCKET_PATH - SOCKET_NAME - len('/ray')}"
    )


def _in_a_line(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:300]


def send_tables_as_ipc() -> None:
    """Have this process send tables in Arrow's stream format, which is mapped by those who read it.

    Ray's own way takes a table apart column by column: 0.7 ms to send a shard and 0.3 ms for each reader, not 0.02.
    """
    ray.util.register_serializer(pa.Table, serializer=_to_ipc, deserializer=_from_ipc)


def _to_ipc(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _from_ipc(stream: pa.Buffer) -> pa.Table:
    return pa.ipc.open_stream(stream).read_all()


def _probe(address: str) -> None:
    # Ray itself goes on trying an address where nobody listens for minutes.
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit():
        raise ValueError("write it as host:port of the head node, usually port 6379")
    socket.create_connection((host.strip("[]"), int(port)), timeout=PROBE_S).close()


def _count(resources: ResourcesConfig, kind: str) -> int:
    return int(getattr(resources, f"num_{kind}s"))


def _bundle(resources: ResourcesConfig, kind: str) -> dict[str, float]:
    if kind == HEAD:
        # It gets what is asked for who learns and samples in it; that is one policy where it does both.
        inside = [_bundle(resources, own) for own in KINDS[:2] if _count(resources, own) == 0]
        most = {name: max(bundle.get(name, 0.0) for bundle in inside) for bundle in inside for name in bundle}
        return most or {"CPU": 0.1}
    asked = {
        "CPU": getattr(resources, f"num_cpus_per_{kind}"),
        "GPU": getattr(resources, f"num_gpus_per_{kind}", 0.0),
    }
    return {name: amount for name, amount in asked.items() if amount > 0}


class Placement:
    """Room for all actors of a run, taken at once: a placement group with one bundle per replica.

    Args:
        slot: with a bundle for the process that holds the trainer, `bundle(HEAD, 0)`.
        group: a slot that is there already, and stays with whoever made it.

    Attributes:
        group: as Ray has it.

    Raises:
        UserError: the cluster has no such room within `resources.wait_s`; names what is missing.
    """

    def __init__(self, resources: ResourcesConfig, group: Any = None, slot: bool = False) -> None:
        self._bundles = {
            **({(HEAD, 0): _bundle(resources, HEAD)} if slot or group is not None else {}),
            **{(kind, index): _bundle(resources, kind) for kind in KINDS for index in range(_count(resources, kind))},
        }
        self._given = group is not None
        if self._given:
            self.group = group
            return
        self.group = ray.util.placement_group(list(self._bundles.values()), strategy="PACK")
        placed = False
        try:
            placed = self.group.wait(resources.wait_s)
        finally:
            if not placed:
                self.remove()
        if not placed:
            raise UserError(self._what_is_missing(resources))

    def bundle(self, kind: str, index: int) -> dict[str, Any]:
        """The actor options (resources and scheduling strategy) that put replica `index` of `kind` in its place."""
        bundle = self._bundles[kind, index]
        place = PlacementGroupSchedulingStrategy(self.group, list(self._bundles).index((kind, index)))
        return {"num_cpus": bundle["CPU"], "num_gpus": bundle.get("GPU", 0.0), "scheduling_strategy": place}

    def remove(self) -> None:
        """Gives the room back where it is its own; actors still in it are killed."""
        if self._given:
            return
        ray.util.remove_placement_group(self.group)

    def _what_is_missing(self, resources: ResourcesConfig) -> str:
        total, free = ray.cluster_resources(), ray.available_resources()
        need: dict[str, float] = {}
        for bundle in self._bundles.values():
            for name, amount in bundle.items():
                need[name] = need.get(name, 0.0) + amount
        missing = {name: amount - free.get(name, 0.0) for name, amount in need.items() if amount > free.get(name, 0.0)}
        counts = Counter(kind for kind, _ in self._bundles)
        asked = " and ".join(f"{count} x {{{_amounts(_bundle(resources, kind))}}}" for kind, count in counts.items())
        has = " and ".join(f"{total.get(name, 0.0):g} {name} ({free.get(name, 0.0):g} free)" for name in need)
        lack = f"missing {_amounts(missing)}" if missing else "no single node has room for one of them"
        short = [kind for kind in counts if not missing or missing.keys() & _bundle(resources, kind)]
        knobs = [f"resources.num_{kind}s" for kind in short if kind != HEAD]
        knobs = knobs or [f"resources.num_{name.lower()}s_per_learner" for name in missing or need]
        return (
            f"no room for the run's actors within {resources.wait_s:g} s: needs {asked}, the cluster has {has}; "
            f"{lack}. Lower {' or '.join(knobs)}, or what each asks for, or raise resources.wait_s"
        )


def _amounts(bundle: dict[str, float]) -> str:
    return ", ".join(f"{name}: {amount:g}" for name, amount in bundle.items())


def slot_bundles(resources: ResourcesConfig) -> list[dict[str, float]]:
    """What a slot asks for: a process that holds a trainer, and then each of the trainer's actors."""
    workers = [_bundle(resources, kind) for kind in KINDS for _ in range(_count(resources, kind))]
    return [_bundle(resources, HEAD), *workers]


def slots_that_fit(resources: ResourcesConfig) -> int:
    """How many slots the cluster's nodes have room for when nothing else is on them."""
    nodes = [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]
    count = 0
    while True:
        for bundle in slot_bundles(resources):
            node = next((n for n in nodes if all(n.get(k, 0.0) >= v - 1e-9 for k, v in bundle.items())), None)
            if node is None:
                return count
            for name, amount in bundle.items():
                node[name] -= amount
        count += 1
