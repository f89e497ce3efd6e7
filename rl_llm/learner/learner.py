"""The learner: turns a step's rollout table into updates of the policy's weights."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from rl_llm.algorithms import build_algorithm
from rl_llm.config import RunConfig
from rl_llm.errors import RunFailed
from rl_llm.files import replacing
from rl_llm.learner.batch import Batch, Minibatch, make_batch
from rl_llm.learner.objective import Objective
from rl_llm.learner.optimizer import build_optimizer, set_rate
from rl_llm.learner.parallel import DataParallel, MakeParallel
from rl_llm.learner.supervised import encode_examples, train_supervised
from rl_llm.policies import load_policy
from rl_llm.runtime.shared import refuse_unshared
from rl_llm.runtime.weights import Manifest, flatten

REFERENCE = "reference/"


class Learner:
    """Holds the policy that learns, its optimiser, and what the algorithm needs beside: a reference, a value function.

    One of several where `resources.num_learners` says so: each computes its share of a step's rows, gradients are added
    up, and every learner makes the same update. Every method is for all of them to be called.
    """

    def __init__(self, config: RunConfig, base: str, rank: int = 0, parallel: MakeParallel = DataParallel) -> None:
        """Load the policy from folder `base`, the start of reinforcement learning.

        `parallel`: makes, from rank and count, how several learners go together.
        """
        torch.set_num_threads(config.resources.threads)
        self.config, self.base = config, base
        self.policy = load_policy(base, config.policy)
        self.parallel = parallel(rank, max(config.resources.num_learners, 1))
        algorithm = build_algorithm(config.algorithm)
        # What is cloned from the policy is cloned before it is laid over the learners.
        self.objective = Objective(algorithm, config.algorithm, self.policy, self.parallel)
        self.parallel.wrap(self.policy)
        value = self.objective.value
        self.values = {} if value is None else value.parameters
        self.learning = {**self.policy.trainable, **self.values}
        self.optimizer = build_optimizer(
            self.policy.trainable.values(), config.learner, self.values.values(), config.algorithm.value.lr_factor
        )
        self.bad_updates = self.bad_in_a_row = 0

    def open(self) -> tuple[str, int] | None:
        """Where the first of several is found by the others."""
        import ray.util  # several learners are Ray actors

        host = ray.util.get_node_ip_address()
        return (host, self.parallel.open(host)) if self.parallel.rank == 0 else None

    def join(self, host: str, port: int) -> None:
        """Wait for the other learners; only then may an update be asked for."""
        self.parallel.join(host, port, self.policy.device)

    def close(self) -> None:
        self.parallel.close()

    def update(self, columns: pa.Table, step: int, lr: float, path: str | None, *shards: pa.Table) -> dict[str, float]:
        """The updates of a step on its shards: `epochs` passes of `minibatches` each.

        Args:
            columns: rewards, statuses, `reward`, `trained`, `advantage` and, for algorithms that make advantages of
                tokens, `outcome`, a row for each of the shards' rows in their order.
            step: from 0.
            lr: the learning rate.
            path: where the table is written (Parquet), if anywhere.
            shards: the rollout tables of the step's requests.

        Returns:
            Metrics. `entropy` is the mean -log p of the sampled tokens, in nats: an estimate of the policy's entropy
            that is biased where top_p, top_k or min_new_tokens cut the distribution that was sampled from. With an
            entropy bonus it is the entropy itself.

        Raises:
            RunFailed: no row has a reward, or `learner.max_bad_steps` updates in a row were not finite.
        """
        table = pa.concat_tables(shards)
        for name in columns.column_names:
            table = table.append_column(name, columns[name])
        if path and self.parallel.rank == 0:
            with replacing(Path(path)) as aside:
                pq.write_table(table, aside)
        table = table.filter(table["trained"])
        if table.num_rows == 0:
            raise RunFailed(f"step {step + 1}: no row has a reward; see failures.jsonl")
        parallel = self.parallel
        batch = make_batch(table, self.config, step, self.policy.pack, parallel.rank, parallel.count)
        trunk = self.objective.value and self.objective.value.trunk
        # Dropout would make the ratio of new to old log-probs differ from 1 by chance.
        with self.policy.training(dropout=0.0), trunk.training(dropout=0.0) if trunk else contextlib.nullcontext():
            return self._updates(batch, step, lr)

    def _updates(self, batch: Batch, step: int, rate: float) -> dict[str, float]:
        updates = self.config.learner.epochs * len(batch.minibatches)
        self._forget()
        if step == 0:
            self.objective.begin(batch)
        self.objective.prepare(batch, updates)
        results = [
            self._update(batch, minibatch, rate, step)
            for _ in range(self.config.learner.epochs)
            for minibatch in batch.minibatches
        ]
        refresh, reference = self.config.algorithm.reference.refresh_every, self.objective.reference
        if reference is not None and refresh and (step + 1) % refresh == 0:
            reference.refresh(self.policy.named_weights())
        tokens = sum(minibatch.divisor.tokens for minibatch in batch.minibatches)
        samples = len(batch.groups)
        loss, norm = (float(np.mean(column)) for column in zip(*results, strict=True))
        return {
            "loss": loss,
            "grad_norm": norm,
            "lr": rate,
            **self.objective.metrics(tokens * self.config.learner.epochs, samples, updates),
            "bad_steps": self.bad_updates,
            "tokens/trained": tokens,
        }

    def _forget(self) -> None:
        """What an update that was cut short has left."""
        self.optimizer.zero_grad(set_to_none=True)
        self.objective.clear()

    def _update(self, batch: Batch, minibatch: Minibatch, rate: float, step: int) -> tuple[float, float]:
        """One update; returns the loss and the norm of the policy's gradient."""
        total = torch.zeros(1, dtype=torch.float64)
        with self.policy.casting_once():
            for part in minibatch.microbatches:
                part_loss = self.objective.loss(batch, part, minibatch.divisor)
                part_loss.backward()
                total += part_loss.detach().double().cpu()
        self.parallel.sync_gradients(self.learning.values())
        loss = self.parallel.total(total).item()
        limit = self.config.learner.max_grad_norm
        norm = self.parallel.clip(self.policy.trainable.values(), limit)
        # Apart, or a value loss far off would leave the policy little of the norm.
        value_norm = self.parallel.clip(self.values.values(), limit)
        self.apply(loss, norm, value_norm, rate, step)
        return loss, norm

    def apply(self, loss: float, norm: float, value_norm: float, rate: float, step: int) -> None:
        """Follow the gradients that are there, unless they are not finite; they are gone afterwards."""
        if np.isfinite([loss, norm, value_norm]).all():
            self.bad_in_a_row = 0
            set_rate(self.optimizer, rate)
            self.optimizer.step()
        else:
            self.bad_updates += 1
            self.bad_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.bad_in_a_row >= self.config.learner.max_bad_steps:
            norms = f"{norm:g}" + (f" and of the value function {value_norm:g}" if self.values else "")
            raise RunFailed(
                f"step {step + 1}: loss {loss:g} and gradient norm {norms}, not finite for "
                f"{self.bad_in_a_row} updates in a row; lower learner.lr or check the rewards' range"
            )

    def weights(self) -> tuple[Manifest, np.ndarray]:
        """The trainable weights, flat, as the second of two values: from an actor it stays in the object store."""
        whole = self.parallel.whole(self.policy.named_weights().items())
        if self.parallel.rank > 0:  # takes part, and has nothing to give
            return (), np.array([0 * len(name) for name, _ in whole], np.uint8)[:0]
        return flatten(whole)

    def save_weights(self, file: Path) -> None:
        self._save(dict(self.parallel.whole(self.policy.named_weights().items())), file)

    def load_weights(self, file: Path) -> None:
        """Put saved weights in place; the optimiser is left as it is."""
        saved = load_file(file, device=str(self.policy.device))
        self.policy.load_named(self.parallel.scatter((name, saved[name]) for name in self.policy.trainable))

    def save(self, folder: Path) -> None:
        """Everything an exact resume needs of the learner: weights, optimiser, values, reference, counters."""
        self.save_weights(folder / "weights.safetensors")
        tensors = {"rng": torch.get_rng_state()}
        tensors |= {name: p.detach() for name, p in self.values.items()}
        if self.objective.reference is not None:
            tensors |= {REFERENCE + name: w for name, w in self.objective.reference.named_weights().items()}
        for name, p in self.learning.items():
            for key, value in self.optimizer.state[p].items():
                if value is not None:
                    tensors[f"{key}/{name}"] = value.detach()
        self._save(dict(self.parallel.whole(tensors.items())), folder / "optimizer.safetensors")
        state = {
            "bad_updates": self.bad_updates,
            "bad_in_a_row": self.bad_in_a_row,
            "kl_coef": self.objective.kl_coefficient.value,
            "kl": self._kl(),
        }
        if self.parallel.rank == 0:
            (folder / "learner.json").write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        """Go on from what `save` left. A KL that is configured otherwise than it was then begins as configured."""
        self.load_weights(folder / "weights.safetensors")
        tensors = dict(self.parallel.scatter(load_file(folder / "optimizer.safetensors").items()))
        torch.set_rng_state(tensors.pop("rng"))
        refreshed = {name: tensors.pop(name) for name in list(tensors) if name.startswith(REFERENCE)}
        reference = self.objective.reference
        if reference is not None and refreshed:
            reference.refresh({name.removeprefix(REFERENCE): w for name, w in refreshed.items()})
        elif reference is not None and reference.named_weights():
            reference.restart(load_policy(self.base, self.config.policy))
        with torch.no_grad():
            for name, p in self.values.items():
                p.copy_(tensors.pop(name))
        self._forget()
        self.optimizer.state.clear()
        for key, value in tensors.items():
            kind, name = key.split("/", 1)
            p = self.learning[name]
            self.optimizer.state[p][kind] = value.to(p.device)
        state = json.loads((folder / "learner.json").read_text())
        self.bad_updates, self.bad_in_a_row = state["bad_updates"], state["bad_in_a_row"]
        as_then = state["kl"] == self._kl()
        self.objective.kl_coefficient.value = state["kl_coef"] if as_then else self.config.algorithm.kl.coef

    def _kl(self) -> dict[str, Any]:
        return self.config.algorithm.kl.model_dump(mode="json")

    def _save(self, tensors: dict[str, torch.Tensor], file: Path) -> None:
        if self.parallel.rank == 0:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)

    def export(self, folder: Path) -> None:
        """Leave a folder that `transformers` loads."""
        if self.parallel.rank == 0:
            self.policy.save_pretrained(folder)

    def supervise(self, prompts: Sequence[np.ndarray], targets: Sequence[list[str]], tokens: int) -> int:
        """Supervised training with the warm start's settings on about `tokens` target tokens; returns how many.

        Of several learners only the first one trains. Nobody may wait for it, as that may take hours: `follow` is a
        call of its own.
        """
        if self.parallel.rank > 0:
            return 0
        warm = self.config.warm_start
        examples = encode_examples(self.policy, prompts, targets, warm.max_target_tokens)
        return train_supervised(self.policy, examples, warm, self.config.trainer.seed + 1, tokens=tokens)

    def follow(self) -> None:
        """Take the weights of the first of several learners."""
        self.policy.load_named(self.parallel.scatter(self.policy.named_weights().items()))

    def see(self, mark: Path) -> None:
        """Raise `UserError` where the run directory, which has this file of the driver's, is not to be seen here."""
        refuse_unshared(mark, "name an output")
