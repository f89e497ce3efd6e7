import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rl_llm.errors import RunFailed, UserError
from rl_llm.runtime.pool import Dispatcher, Outcome, Pool, Request, RequestFailed
from rl_llm.runtime.replica import Local, Replica, Shards, fetch


class Clerk:
    """Does what it is asked. Methods that fail the first time leave a mark in `folder` that outlives the process."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def _first_time(self, name: str) -> bool:
        assert self.folder is not None
        try:
            (self.folder / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def double(self, number: int) -> int:
        return 2 * number

    def total(self, numbers: list[int]) -> int:
        return sum(numbers)

    def pid(self) -> int:
        return os.getpid()

    def variable(self, name: str) -> str | None:
        return os.environ.get(name)

    def shard(self, number: int) -> tuple[int, list[int]]:
        return number, list(range(number))

    def table(self, table: pa.Table) -> tuple[pa.Table, pa.Table]:
        return table, table

    def weights(self) -> tuple[None, np.ndarray]:
        return None, np.zeros(2**20, np.uint8)

    def read(self, pipe: str) -> str:
        return Path(pipe).read_text()

    def fail(self, message: str) -> None:
        raise LookupError(message)

    def stop(self) -> None:
        os._exit(1)

    def hang(self) -> None:
        threading.Event().wait()

    def stop_once(self, name: str, number: int) -> int:
        if self._first_time(name):
            os._exit(1)
        return number

    def hang_once(self, name: str, number: int) -> int:
        if self._first_time(name):
            self.hang()
        return number

    def lose_once(self, name: str, number: int) -> int:
        from ray.exceptions import OwnerDiedError

        if self._first_time(name):
            raise OwnerDiedError("0" * 40, b"", "")
        return number

    def report_and_hang_once(self, pipe: str, number: int) -> int:
        if self._first_time("reported"):
            Path(pipe).write_text(str(os.getpid()))
            self.hang()
        return number


class Numbered:
    """Knows which one it is."""

    def __init__(self, rank: int = 0) -> None:
        self.rank = rank

    def number(self) -> int:
        return self.rank

    def pid(self) -> int:
        return os.getpid()

    def fail_at(self, rank: int) -> None:
        if rank == self.rank:
            raise LookupError(f"rank {rank}")

    def stop_at(self, rank: int) -> None:
        if rank == self.rank:
            os._exit(1)


class NeverReady:
    def __init__(self, how: str) -> None:
        if how == "raise":
            raise UserError("no model folder 'x'")
        if how == "stop":
            os._exit(1)
        threading.Event().wait()


MakePool = Callable[..., Pool]
_replies: list[tuple[str, Outcome]] = []


@pytest.fixture
def make_pool(ray_session: None) -> Iterator[MakePool]:
    """Pools of actors that reserve nothing, so that tests do not wait for each other's to go; 0: in this process."""
    from rl_llm.runtime.actor import Actor

    pools = []
    _replies.clear()

    def make(
        size: int,
        *args: Any,
        name: str = "clerk",
        cls: type = Clerk,
        threads: int = 1,
        dispatcher: Dispatcher | None = None,
        **settings: Any,
    ) -> Pool:
        def place(index: int) -> Replica:
            return Actor(threads, {"num_cpus": 0}) if size else Local()

        pools.append(Pool(name, partial(cls, *args), place, max(size, 1), dispatcher, **settings))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def request(id: str, method: str, *args: Any, deadline_s: float = 60.0, **settings: Any) -> Request:
    return Request(id, method, args, deadline_s, reply=lambda outcome: _replies.append((id, outcome)), **settings)


def answers(pool: Pool, count: int | None = None) -> dict[str, Outcome]:
    """The first `count` outcomes, or all, of a dispatcher's pools by request id; none has more than one."""
    pool.dispatcher.serve(None if count is None else lambda: len(_replies) >= count)
    found = dict(_replies)
    assert len(found) == len(_replies)
    _replies.clear()
    return found


@pytest.mark.parametrize("size", [0, 3])
def test_every_request_is_answered_once_whatever_the_number_of_workers(make_pool: MakePool, size: int) -> None:
    pool = make_pool(size)
    for number in range(20):
        pool.submit(request(str(number), "double", number))
    assert {id: outcome.result() for id, outcome in answers(pool).items()} == {str(n): 2 * n for n in range(20)}
    assert pool.counters == {"restarts": 0, "retries": 0, "timeouts": 0}


def test_deaths_hangs_and_exceptions_lose_and_double_nothing(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(3, tmp_path, retry_timeouts=True)
    for number in range(12):
        id = str(number)
        if number in (1, 4):
            pool.submit(request(id, "stop_once", id, number))
        elif number == 6:
            pool.submit(request(id, "hang_once", id, number, deadline_s=1.0))
        elif number == 8:
            pool.submit(request(id, "lose_once", id, number))
        elif number == 9:
            pool.submit(request(id, "fail", "no such row"))
        else:
            pool.submit(request(id, "double", number))
    found = answers(pool)
    for id, outcome in found.items():
        number = int(id)
        if number == 9:
            assert outcome.error is not None
            assert outcome.error.kind == "error"
        else:
            assert outcome.result() == (number if number in (1, 4, 6, 8) else 2 * number)
    assert found.keys() == {str(number) for number in range(12)}
    assert pool.counters == {"restarts": 4, "retries": 4, "timeouts": 1}


def test_a_worker_killed_from_outside_in_mid_request(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(2, tmp_path)
    pool.submit(request("warm", "pid"))
    answers(pool)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    pool.submit(request("victim", "report_and_hang_once", str(pipe), 7))
    pool.submit(request("other", "double", 1))
    os.kill(int(pipe.read_text()), signal.SIGKILL)
    assert {id: outcome.result() for id, outcome in answers(pool).items()} == {"victim": 7, "other": 2}


def test_a_poison_request_is_given_up_by_name_and_the_rest_answered(make_pool: MakePool) -> None:
    pool = make_pool(2, max_attempts=2)
    pool.submit(request("step-3/1", "stop", note="prompts 4 to 8"))
    for number in range(5):
        pool.submit(request(str(number), "double", number))
    found = answers(pool)
    error = found.pop("step-3/1").error
    assert error is not None
    assert error.kind == "poison"
    assert re.search(r"clerk request step-3/1 \(prompts 4 to 8\) brought down 2 worker.*ActorDiedError", str(error))
    assert {id: outcome.result() for id, outcome in found.items()} == {str(n): 2 * n for n in range(5)}


def test_a_missed_deadline_fails_at_once_unless_timeouts_are_retried(make_pool: MakePool) -> None:
    dispatcher = Dispatcher()
    pools = [make_pool(1, max_attempts=2, retry_timeouts=retry, dispatcher=dispatcher) for retry in (False, True)]
    for index, pool in enumerate(pools):
        pool.submit(request(f"slow-{index}", "hang", deadline_s=0.5))
    outcomes = answers(pools[0])
    for index, (pool, attempts) in enumerate(zip(pools, (1, 2), strict=True)):
        error = outcomes[f"slow-{index}"].error
        assert error is not None
        assert error.kind == "timeout"
        assert "0.5 s" in str(error)
        assert pool.counters == {"restarts": attempts, "retries": attempts - 1, "timeouts": attempts}
    assert pools[0].call("double", 4) == 8


def test_an_exception_keeps_its_type_message_and_remote_traceback(make_pool: MakePool) -> None:
    pool = make_pool(1)
    pool.submit(request("a", "fail", "no such word"))
    outcome = answers(pool)["a"]
    assert outcome.error is not None
    assert type(outcome.error.cause) is LookupError
    assert "raise LookupError(message)" in "".join(outcome.error.cause.__notes__)
    with pytest.raises(LookupError, match=r"^no such word"):
        outcome.result()
    assert pool.counters["restarts"] == 0


def test_in_process_exceptions_are_raised_as_they_are_and_the_pool_lives_on(make_pool: MakePool) -> None:
    pool = make_pool(0)
    for method in ("fail", "double"):
        pool.submit(request(method, method, 3))
    with pytest.raises(LookupError, match="3"):
        pool.dispatcher.serve()
    assert answers(pool) == {}  # what was behind it is forgotten
    assert pool.call("double", 3) == 6


def test_in_process_pool_never_imports_ray() -> None:
    code = (
        "import sys; from rl_llm.runtime.pool import *; from rl_llm.runtime.replica import Local;"
        "pool = Pool('p', list, lambda index: Local(), 1);"
        "assert pool.call('count', 1) == 0; assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_work_passes_from_one_pool_to_another_while_both_are_served(
    make_pool: MakePool, sizes: tuple[int, int]
) -> None:
    dispatcher = Dispatcher()
    first, second = (
        make_pool(size, name=name, dispatcher=dispatcher) for size, name in zip(sizes, ("one", "two"), strict=True)
    )

    def pass_on(number: int, outcome: Outcome) -> None:
        assert outcome.result() == number
        second.submit(request(str(number), "total", outcome.kept))

    for number in range(6):
        reply = partial(pass_on, number)
        first.submit(Request(str(number), "shard", (number,), 60.0, returns=2, reply=reply))
    assert {id: outcome.result() for id, outcome in answers(second).items()} == {
        str(n): sum(range(n)) for n in range(6)
    }


def test_waiting_for_one_pool_serves_the_others(make_pool: MakePool, tmp_path: Path) -> None:
    dispatcher = Dispatcher()
    slow, other = make_pool(1, name="slow", dispatcher=dispatcher), make_pool(1, name="other", dispatcher=dispatcher)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def let_go(outcome: Outcome) -> None:
        pipe.write_text(str(outcome.result()))

    # The one that is waited for ends only when the other one's reply has been called; it reads once it is there.
    slow.call("pid")
    other.submit(Request("other", "double", (4,), 60.0, reply=let_go))
    assert slow.call("read", str(pipe)) == "8"


def test_a_wait_for_nothing_is_an_error(make_pool: MakePool) -> None:
    with pytest.raises(RuntimeError, match="nothing is under way"):
        make_pool(0).dispatcher.serve(lambda: False)


def test_a_killed_worker_is_replaced_and_its_request_answered(make_pool: MakePool, tmp_path: Path) -> None:
    pool = make_pool(1, tmp_path)
    pool.call("pid")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    pool.submit(request("victim", "report_and_hang_once", str(pipe), 7, deadline_s=math.inf))
    pool.submit(request("next", "double", 1))
    pipe.read_text()  # killed before it has begun, it would hang in the next worker
    pool.kill(0)
    assert {id: outcome.result() for id, outcome in answers(pool).items()} == {"victim": 7, "next": 2}
    assert pool.counters["restarts"] == 1


@pytest.mark.parametrize("size", [0, 2])
def test_rebuilt_workers_are_others_in_the_same_processes(make_pool: MakePool, size: int) -> None:
    pool = make_pool(size, cls=Numbered)
    if size:
        pool.dispatcher.serve(lambda: all(pool.where(index) for index in range(size)))
    before = [pool.where(index) for index in range(size)]
    pool.submit(request("forgotten", "number"))
    pool.rebuild(partial(Numbered, 5))
    assert answers(pool) == {}
    assert pool.call("number") == 5
    assert [pool.where(index) for index in range(size)] == before


def test_shards_answer_as_one(make_pool: MakePool) -> None:
    from rl_llm.runtime.actor import Actor

    def place(index: int) -> Shards:
        return Shards([Actor(1, {"num_cpus": 0}) for _ in range(2)])

    with closing(Pool("shards", Numbered, place, 1, max_attempts=1)) as pool:
        assert pool.call("number") == 0  # the first one's
        with pytest.raises(LookupError, match="rank 1"):
            pool.call("fail_at", 1)
        assert pool.call("number") == 0
        with pytest.raises(RequestFailed, match=r"shards request stop_at brought down .* rank 1: ActorDiedError"):
            pool.call("stop_at", 1)


def test_the_second_return_stays_in_the_object_store(make_pool: MakePool) -> None:
    import ray

    pool = make_pool(1)
    value, kept = pool.call("shard", 3, returns=2)
    pool.close()
    assert value == 3
    assert isinstance(kept, ray.ObjectRef)
    assert fetch([kept, "plain"]) == [[0, 1, 2], "plain"]


def test_a_table_travels_whole_and_a_slice_without_the_rest(make_pool: MakePool) -> None:
    import ray

    from rl_llm.runtime.cluster import send_tables_as_ipc

    send_tables_as_ipc()
    whole = pa.table({"number": range(100_000), "ids": [[1, 2]] * 100_000}).replace_schema_metadata({"of": "a task"})
    few = whole.slice(7, 3)
    assert len(ray.cloudpickle.dumps(few)) < 10_000
    pool = make_pool(1)
    for table in (few, whole.slice(0, 0)):
        value, kept = pool.call("table", table, returns=2)
        for received in (value, *fetch([kept])):
            assert received.equals(table, check_metadata=True)


def test_an_array_is_mapped_by_its_readers(make_pool: MakePool) -> None:
    pool = make_pool(1)
    _, kept = pool.call("weights", returns=2)
    first, second = fetch([kept, kept])
    assert not first.flags.writeable
    assert np.shares_memory(first, second)


def test_cancel_forgets_all_requests_and_leaves_the_pool_usable(make_pool: MakePool) -> None:
    pool = make_pool(2)
    for number in range(4):
        pool.submit(request(str(number), "double", number))
    answers(pool, count=1)
    pool.submit(request("stuck", "hang", deadline_s=math.inf))
    pool.cancel()
    assert answers(pool) == {}
    pool.submit(request("after", "double", 5))
    assert {id: outcome.result() for id, outcome in answers(pool).items()} == {"after": 10}


def test_outcomes_that_one_wait_leaves_come_in_the_next(make_pool: MakePool) -> None:
    pool = make_pool(1)
    for number in range(3):
        pool.submit(request(str(number), "double", number))
    first = answers(pool, count=1)
    assert {*first, *answers(pool)} == {"0", "1", "2"}


def test_a_single_worker_with_a_state_fails_with_its_death(make_pool: MakePool) -> None:
    pool = make_pool(1, name="learner", max_attempts=1)
    assert pool.call("double", 4) == 8
    with pytest.raises(LookupError, match="bad"):
        pool.call("fail", "bad")
    with pytest.raises(RequestFailed, match="learner request stop"):
        pool.call("stop")
    assert pool.counters["retries"] == 0


def test_what_a_constructor_raises_is_raised(make_pool: MakePool) -> None:
    pool = make_pool(1, "raise", cls=NeverReady)
    with pytest.raises(UserError, match="no model folder 'x'"):
        pool.call("anything")


@pytest.mark.parametrize(("how", "limit_s", "cause"), [("stop", 60.0, "ActorDiedError"), ("hang", 0.5, "of 0.5 s")])
def test_a_worker_that_does_not_start_ends_the_run_by_name(
    make_pool: MakePool, how: str, limit_s: float, cause: str
) -> None:
    pool = make_pool(1, how, cls=NeverReady, max_attempts=2, start_timeout_s=limit_s)
    with pytest.raises(RunFailed, match=f"clerk-0 could not be started, 2 times in a row.*{cause}"):
        pool.call("anything")


def test_workers_have_the_threads_asked_for(make_pool: MakePool) -> None:
    with closing(make_pool(1, threads=3)) as pool:
        assert pool.call("variable", "OMP_NUM_THREADS") == "3"
        assert pool.call("variable", "OMP_WAIT_POLICY") == "PASSIVE"


def test_the_watchdog_says_who_waits_for_whom(make_pool: MakePool, caplog: pytest.LogCaptureFixture) -> None:
    dispatcher = Dispatcher(watchdog_s=0.3)
    busy = make_pool(1, name="rollout", dispatcher=dispatcher)
    idle = make_pool(1, name="reward", dispatcher=dispatcher)
    for pool in (busy, idle):
        pool.call("pid")
    for id in ("step-12/3", "step-12/4"):
        busy.submit(request(id, "hang", deadline_s=1.0))
    with caplog.at_level(logging.WARNING, logger="rl_llm.runtime.pool"):
        answers(busy, count=1)
    pattern = (
        r"nothing finished for \d+ s: rollout-0 \(pid \d+ on [\d.]+\) on step-12/3 for \d of 1 s, attempt 1, "
        r"1 queued; reward idle"
    )
    assert re.search(pattern, caplog.text)
