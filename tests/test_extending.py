"""What others will add, each on a page and without a change elsewhere: a policy, an engine, a backend, a sampler."""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import engines
import pytest
import tiny
import torch
from conftest import Tiny
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig
from two_labels import LABELS
from updates import columns, make_shard

from rl_llm.config import PolicyConfig
from rl_llm.errors import UserError
from rl_llm.launch.preflight import make_plan
from rl_llm.learner.learner import Learner
from rl_llm.policies import CausalLM, Policy
from rl_llm.runtime.weights import Weights
from rl_llm.trainer.collector import Pending, Rollouts
from rl_llm.trainer.sampler import Synchronous
from rl_llm.trainer.trainer import Trainer

# ---- a policy of two labels: two_labels.py


def build_classifier(folder: Path, tokenizer: Path) -> Path:
    words = AutoTokenizer.from_pretrained(tokenizer)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(BertConfig(vocab_size=len(words), num_labels=2, **shape))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def warm(completions: list[str], colour: list[str], **columns: Any) -> list[float]:
    return [float(text == LABELS[name in ("red", "gold")]) for text, name in zip(completions, colour, strict=True)]


@pytest.mark.learning
@pytest.mark.parametrize("algorithm", [{"name": "grpo", "kl": {"coef": 0.01}}, {"name": "ppo"}], ids=["grpo", "ppo"])
def test_policy_of_two_labels_learns_through_the_same_loop(
    tiny_run: Tiny, tmp_path: Path, algorithm: dict[str, Any], seed: int
) -> None:
    model = build_classifier(tmp_path / "classifier", tiny_run.policy)
    config = tiny_run.config(
        policy={"type": "two_labels:TwoLabels", "model": str(model)},
        rollout={"prompts_per_step": 16, "samples_per_prompt": 8, "rows_per_request": 64},
        rewards={"components": {"warm": {"use": "function:warm"}}},
        algorithm=algorithm,
        learner={"lr": 3e-3},
        trainer={"steps": 30, "seed": seed},
        evaluation={"every": 15},
    )
    run = tiny.train(config, tmp_path / "run", functions={"warm": warm})
    assert run.summary["before"]["warm"]["mean"] < 0.8
    assert run.summary["after"]["warm"]["mean"] > 0.95
    assert run.metrics["mismatch/max"].max() < 1e-4
    assert AutoModelForSequenceClassification.from_pretrained(run.model).config.num_labels == 2


def test_policy_that_is_none_is_refused(tiny_run: Tiny) -> None:
    for kind, message in {"causal_ml": "did you mean 'causal_lm'", "engines:Canned": "no class made from"}.items():
        with pytest.raises(UserError, match=message):
            make_plan(tiny_run.config(policy={"type": kind}), {})


# ---- an engine that says the same to everything: engines.py


def test_canned_engine_is_what_the_learner_learns_from(tiny_run: Tiny, tmp_path: Path) -> None:
    config = tiny_run.config(rollout={"engine": "engines:canned"}, trainer={"steps": 2})
    engines.LOADED.clear()
    run = tiny.train(config, tmp_path / "run")
    assert set(run.rollouts()["completion"].to_pylist()) == {engines.TEXT}
    assert {tuple(ids) for ids in run.rollouts()["completion_ids"].to_pylist()} == {tuple(engines.TOKENS)}
    # The first policy, one after each of the steps, and the best one: each publish has a number of its own.
    assert [weights.number for weights in engines.LOADED] == [1, 2, 3, 4]
    assert [weights.step for weights in engines.LOADED][:3] == [0, 1, 2]
    with pytest.raises(UserError, match="did you mean 'transformers'"):
        make_plan(tiny_run.config(rollout={"engine": "transformer"}), {})


# ---- a backend: learners that are threads of one process


class Threads:
    """Gradients are added up where all threads meet."""

    def __init__(self, parts: list[Any], barrier: threading.Barrier, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self._parts, self._barrier = parts, barrier

    def _meet(self, mine: Any) -> list[Any]:
        self._parts[self.rank] = mine
        self._barrier.wait()
        everybody = list(self._parts)
        self._barrier.wait()
        return everybody

    def open(self, host: str) -> int:
        return 0

    def join(self, host: str, port: int, device: torch.device) -> None:
        pass

    def wrap(self, policy: Policy) -> None:
        pass

    def sync_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        for p in parameters:
            p.grad = torch.stack(self._meet(torch.zeros_like(p) if p.grad is None else p.grad)).sum(dim=0)

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> float:
        return float(nn.utils.clip_grad_norm_(parameters, limit))

    def whole(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        yield from named

    def scatter(self, named: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named:
            yield name, self._meet(tensor.clone())[0]

    def total(self, values: Tensor) -> Tensor:
        return torch.stack(self._meet(values.clone())).sum(dim=0)

    def highest(self, values: Tensor) -> Tensor:
        return torch.stack(self._meet(values.clone())).amax(dim=0)

    def close(self) -> None:
        self._barrier.abort()


def test_learners_over_another_backend_make_the_update_of_one(tiny_run: Tiny) -> None:
    sections = {"learner": {"tokens_per_microbatch": 60}}
    config, base = tiny_run.config(**sections), str(tiny_run.policy)
    shard = make_shard(CausalLM(base, PolicyConfig(precision="fp32")))
    alone = Learner(config, base)
    expected = alone.update(columns(shard), 0, 1e-2, None, shard)
    parts, barrier = [None] * 3, threading.Barrier(3)
    three = tiny_run.config(**sections, resources={"num_learners": 3})
    learners = [Learner(three, base, rank, parallel=partial(Threads, parts, barrier)) for rank in range(3)]
    metrics: dict[int, dict[str, float]] = {}

    def work(rank: int) -> None:
        metrics[rank] = learners[rank].update(columns(shard), 0, 1e-2, None, shard)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics[0] == metrics[1] == metrics[2]
    assert metrics[0] == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for learner in learners:
        assert torch.equal(tiny.flat(learner.policy), tiny.flat(learners[0].policy))
        torch.testing.assert_close(tiny.flat(learner.policy), tiny.flat(alone.policy), rtol=1e-3, atol=1e-4)


# ---- a sampler that is one step ahead


class Pipelined(Synchronous):
    """The next step's rollouts are under way while the learner works on this one's: weights are one update old."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.under_way: deque[Pending] = deque()

    def next(self, step: int, weights: Weights) -> Rollouts:
        count = self.config.rollout.prompts_per_step
        if not self.under_way:
            self.under_way.append(self.start(step, weights, count))
        found = self.collector.wait(self.under_way.popleft())
        self.under_way.append(self.start(step + 1, weights, count))
        return found


def test_pipelined_sampler_works_while_the_learner_does(tiny_run: Tiny, ray_session: None, tmp_path: Path) -> None:
    config = tiny_run.config(
        rollout={"engine": "engines:slow", "rows_per_request": 24},
        algorithm={"loss": "engines:slow_loss"},
        resources={
            "num_rollout_workers": 1, "num_cpus_per_rollout_worker": 0.5, "num_learners": 1, "num_cpus_per_learner": 0.5
        },
    )  # fmt: skip
    plan = make_plan(config, {})
    base = str(tiny_run.policy)
    with Trainer.open(config, tmp_path, plan.task, base, functions=plan.functions, sampler=Pipelined) as trainer:
        trainer.workers.dispatcher.serve(lambda: trainer.workers.rollouts.where(0) is not None)
        start = time.monotonic()
        metrics = [trainer.step() for _ in range(5)]
        seconds = time.monotonic() - start
    # One after the other they take 10 s.
    assert seconds < 7
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5]
    versions = [set(tiny.table(tmp_path, step)["policy_version"].to_pylist()) for step in range(1, 6)]
    assert versions == [{0}, {0}, {1}, {2}, {3}]
