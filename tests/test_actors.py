"""Whole runs with Ray actors: none of them may change a number."""

import os
import signal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tiny
from conftest import Tiny

import rl_llm
from rl_llm.config import ResourcesConfig
from rl_llm.rewards import Scores
from rl_llm.runs.callbacks import Callback
from rl_llm.runs.run import Run
from rl_llm.runtime.pool import Outcome, Pool, Request, RequestFailed
from rl_llm.trainer.collector import Collector, Pending

# Small shares of a CPU: the actors of a test fit into the tests' Ray whatever else is in it.
SHARES = {"num_cpus_per_rollout_worker": 0.5, "num_cpus_per_reward_worker": 0.5, "num_cpus_per_learner": 0.5}


def resources(**counts: int) -> dict[str, Any]:
    return {"resources": {**SHARES, **{f"num_{kind}": count for kind, count in counts.items()}}}


@pytest.mark.parametrize(
    "counts", [{"rollout_workers": 1}, {"rollout_workers": 3, "reward_workers": 1, "learners": 1}], ids=["one", "all"]
)
def test_actors_leave_the_run_of_one_process(
    tiny_run: Tiny, ray_session: None, tmp_path: Path, counts: dict[str, int]
) -> None:
    tiny.train(tiny_run.config(**resources(**counts)), tmp_path / "run")
    tiny.assert_same_run(tmp_path / "run", tiny_run.undisturbed)


class Kill(Callback):
    """Kills a rollout worker on request step-2/0, an idle one after step 3, and a reward worker in step 4."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark
        self.counters: dict[str, dict[str, int]] = {}

    def on_step(self, trainer: Any, metrics: dict[str, Any]) -> None:
        if metrics["step"] == 1:
            self.kill_on_request(trainer.workers.rollouts, "step-2/0", "step-2/2")
        elif metrics["step"] == 3:
            os.kill(pid(trainer.workers.rollouts, 1), signal.SIGKILL)
            self.mark.touch()

    def kill_on_request(self, pool: Any, first: str, then: str) -> None:
        """Worker 0 is halted when `first` is handed to it, so that it cannot have answered when `then` has its end."""
        submit, victim = pool.submit, pid(pool, 0)

        def disturbed(request: Request) -> None:
            if request.id == first:
                os.kill(victim, signal.SIGSTOP)
            submit(request)
            if request.id == then:
                os.kill(victim, signal.SIGKILL)

        pool.submit = disturbed

    def on_end(self, trainer: Any, summary: dict[str, Any]) -> None:
        self.counters = {pool.name: dict(pool.counters) for pool in (trainer.workers.rollouts, trainer.workers.rewards)}


def pid(pool: Pool, index: int) -> int:
    pool.dispatcher.serve(lambda: pool.where(index) is not None)
    return int(str(pool.where(index)).split()[1])


def test_killed_actors_change_no_number(tiny_run: Tiny, ray_session: None, tmp_path: Path) -> None:
    kill = Kill(tmp_path / "mark")
    components = {
        "match": {"use": "tiny_rewards:match_dying_once", "args": {"mark": str(kill.mark)}},
        "length": {"args": {"mode": "target", "target": 3}, "scale": 0.2},
    }
    config = tiny_run.config(**resources(rollout_workers=2, reward_workers=1), rewards={"components": components})

    tiny.train(config, tmp_path / "run", kill)

    tiny.assert_same_run(tmp_path / "run", tiny_run.undisturbed)
    assert kill.counters["rollout"] == {"restarts": 2, "retries": 2, "timeouts": 0}
    assert kill.counters["reward"] == {"restarts": 1, "retries": 1, "timeouts": 0}


def test_hanging_reward_is_masked_row_by_row(tiny_run: Tiny, ray_session: None, tmp_path: Path) -> None:
    first = Run(tiny_run.undisturbed).rollouts(1)["prompt"][0].as_py()
    components = {
        "match": {"use": "tiny_rewards:match"},
        "slow": {"use": "tiny_rewards:hanging", "args": {"on": first}, "timeout_s": 1.5},
    }
    config = tiny_run.config(
        **resources(reward_workers=1),
        rollout={"prompts_per_step": 6, "samples_per_prompt": 2, "rows_per_request": 4, "max_new_tokens": 5},
        rewards={"components": components},
        trainer={"steps": 1},
    )

    run = tiny.train(config, tmp_path / "run")

    table = run.rollouts(1)
    late = [prompt == first for prompt in table["prompt"].to_pylist()]
    assert sum(late) == 2
    assert table["status/slow"].to_pylist() == ["timeout" if hung else "ok" for hung in late]
    assert table["reward/slow"].to_pylist() == [None if hung else 1.0 for hung in late]
    assert set(table["status/match"].to_pylist()) == {"ok"}
    [failure] = run.failures
    assert (failure["component"], failure["status"], failure["rows"]) == ("slow", "timeout", 2)
    assert "deadline of 1.5 s" in failure["message"]
    assert "deadline of 1.5 s" in (run.path / "report.html").read_text()
    assert run.status == "finished"


class Sent(list):  # type: ignore[type-arg]
    """Stands in for a pool of one reward worker."""

    size = 1
    submit = list.append


def test_quick_components_share_a_request_until_one_is_lost() -> None:
    sent, names = Sent(), ["a", "b", "slow"]
    pools = dict.fromkeys(names, sent)
    collector = Collector(None, pools, dict.fromkeys(names, 60.0), ResourcesConfig(), 1)  # type: ignore[arg-type]
    seconds = {"a": 0.1, "b": 0.1, "slow": 30.0}
    scores = {name: Scores([1.0], ["ok"], seconds[name], []) for name in names}
    summary = pa.table({"length": [1]})

    def asked(pending: Pending, outcome: Outcome | None = None) -> list[Any]:
        """The requests that a rollout, or the outcome of the last request but one, leads to."""
        before = len(sent)
        if outcome is None:
            pending.take_rollout(0, Outcome(summary, "shard"))
        else:
            sent[-2].reply(outcome)
        return [request.args[0] for request in sent[before:]]

    def batch(name: str) -> Pending:
        return Pending(collector, name, names, 1)

    first = batch("step-1")
    assert asked(first) == names
    for request in list(sent):
        request.reply(Outcome(scores[request.args[0]]))
    assert first.done
    assert first.scores == {(0, name): scores[name] for name in names}
    assert asked(batch("step-2")) == [["a", "b"], "slow"]
    third = batch("step-3")
    assert asked(third) == [["a", "b"], "slow"]
    assert asked(third, Outcome(error=RequestFailed("timeout", "too slow"))) == ["a", "b"]
    assert asked(batch("step-4")) == names


def test_async_reward_is_cancelled_and_its_worker_lives(tiny_run: Tiny, ray_session: None, tmp_path: Path) -> None:
    first = Run(tiny_run.undisturbed).rollouts(1)["prompt"][0].as_py()
    slow = {"use": "tiny_rewards:hanging_async", "args": {"on": first}, "timeout_s": 0.5}
    config = tiny_run.config(
        **resources(reward_workers=1),
        rollout={"prompts_per_step": 6, "samples_per_prompt": 2, "rows_per_request": 4, "max_new_tokens": 5},
        rewards={"components": {"slow": slow}},
        trainer={"steps": 1},
    )

    run = tiny.train(config, tmp_path / "run")

    late = [prompt == first for prompt in run.rollouts(1)["prompt"].to_pylist()]
    assert run.rollouts(1)["status/slow"].to_pylist() == ["timeout" if hung else "ok" for hung in late]
    assert run.summary["restarts"]["reward"] == 0


def test_function_given_in_python_scores_in_a_reward_worker(tiny_run: Tiny, ray_session: None, tmp_path: Path) -> None:
    here = os.getpid()

    def elsewhere(completions: list[str], **columns: Any) -> list[float]:
        return [float(os.getpid() != here)] * len(completions)

    run = rl_llm.train(
        tiny_run.policy,
        tiny.rows(),
        rewards=[elsewhere, "length"],
        weights={"length": -0.5},
        output=tmp_path / "run",
        steps=1,
        task={"prompt": "{text}"},
        rollout={"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 4},
        evaluation={"prompts": 2, "test_prompts": 2},
        **resources(reward_workers=1),
    )

    assert run.rollouts(1)["reward/elsewhere"].to_pylist() == [1.0] * 4
    assert run.metrics["weights/length"].tolist() == [-0.5]


def test_component_registered_in_this_process_scores_in_a_reward_worker(
    tiny_run: Tiny, ray_session: None, tmp_path: Path
) -> None:
    here = os.getpid()

    @rl_llm.reward("registered_elsewhere", range=(0, 1))
    def elsewhere(completions: list[str], *, most: float, **columns: Any) -> list[float]:
        return [most * float(os.getpid() != here)] * len(completions)

    spec = {"use": "registered_elsewhere", "args": {"most": 0.5}}
    config = tiny_run.config(
        **resources(reward_workers=1), rewards={"components": {"mine": spec}}, trainer={"steps": 1}
    )
    run = tiny.train(config, tmp_path / "run")
    assert run.rollouts(1)["reward/mine"].to_pylist() == [0.5] * 24
