"""The learner: turns a step's rollout table into one update of the policy's weights."""

import json
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rl_llm.algorithms import build_algorithm, losses
from rl_llm.config import RunConfig
from rl_llm.errors import RunFailed
from rl_llm.learner.optimizer import build_optimizer, learning_rate, set_rate
from rl_llm.learner.reference import Reference
from rl_llm.learner.supervised import encode_examples, train_supervised
from rl_llm.policies import CausalLM
from rl_llm.policies.groups import GroupBatch, make_groups, microbatches, pack
from rl_llm.table import ragged


class Learner:
    """Holds the policy that learns, its optimiser and, where a KL asks for one, a frozen reference."""

    def __init__(self, config: RunConfig, base: str) -> None:
        """Load the policy from folder `base`, the start of reinforcement learning."""
        torch.set_num_threads(config.resources.threads)
        self.config = config
        self.algorithm = build_algorithm(config.algorithm)
        self.policy = CausalLM(base, config.policy)
        self.reference = Reference(self.policy) if self.algorithm.kl.coef else None
        self.optimizer = build_optimizer(self.policy.trainable.values(), self.config.learner)
        self.bad_steps = self.bad_in_a_row = 0

    def update(self, columns: pa.Table, step: int, path: str | None, *shards: pa.Table) -> dict[str, float]:
        """One update on a step's shards.

        Args:
            columns: rewards, statuses, `reward` and `advantage`, a row for each of the shards' rows in their order.
            step: from 0; sets the learning rate.
            path: where the table as trained on is written (Parquet), if anywhere.
            shards: the rollout tables of the step's requests.

        Returns:
            Metrics. `entropy` is the mean -log p of the sampled tokens, in nats: an estimate of the policy's entropy
            that is biased where top_p, top_k or min_new_tokens cut the distribution that was sampled from.

        Raises:
            RunFailed: no row has a reward, or `learner.max_bad_steps` updates in a row were not finite.
        """
        table = pa.concat_tables(shards)
        for name in columns.column_names:
            table = table.append_column(name, columns[name])
        if path:
            _write_whole(table, Path(path))
        rows = np.flatnonzero(table["reward"].is_valid().to_numpy())
        if len(rows) == 0:
            raise RunFailed(f"step {step + 1}: no row has a reward; see failures.jsonl")
        # Dropout would make the ratio of new to old log-probs differ from 1 by chance.
        with self.policy.training(dropout=0.0):
            return self._update(table.take(pa.array(rows)), step)

    def _update(self, table: pa.Table, step: int) -> dict[str, float]:
        chosen = ragged(table["action_mask"])
        engine = ragged(table["logprobs"])
        completions = ragged(table["completion_ids"])
        advantages = torch.tensor(table["advantage"].to_numpy())
        divisor = losses.Divisor(
            tokens=int(sum(mask.sum() for mask in chosen)),
            sequences=table.num_rows,
            max_length=self.config.rollout.max_new_tokens,
        )
        budget = self.config.learner.tokens_per_microbatch
        groups = make_groups(table["group"].to_pylist(), ragged(table["prompt_ids"]), completions, budget)
        rate = learning_rate(self.config.learner, step, self.config.trainer.steps)
        temperature = float(table["temperature"][0].as_py()) or 1.0
        sums = torch.zeros(3, dtype=torch.float64)
        worst = torch.zeros(())
        loss = 0.0
        for part in microbatches(groups, budget):
            batch = pack(part)
            index = batch.rows.tolist()
            mask = _padded([chosen[i] for i in index], batch).to(self.policy.device)
            rollout = _padded([engine[i] for i in index], batch).to(self.policy.device)
            logprobs = self.policy.logprobs(batch, temperature)
            token_loss, kl = self._token_loss(
                batch, logprobs, advantages[batch.rows].to(self.policy.device), temperature
            )
            part_loss = losses.aggregate(token_loss, mask, self.algorithm.aggregation, divisor)
            part_loss.backward()
            loss += float(part_loss.detach())
            gap = (logprobs.detach() - rollout).abs()[mask]
            sums += torch.stack([-logprobs.detach()[mask].sum(), gap.sum(), kl[mask].sum()]).double().cpu()
            worst = torch.maximum(worst, gap.max().cpu())
        norm = torch.nn.utils.clip_grad_norm_(self.policy.trainable.values(), self.config.learner.max_grad_norm)
        self._apply(loss, float(norm), rate, step)
        entropy, mismatch, kl_mean = (sums / divisor.tokens).tolist()
        metrics = {"loss": loss, "grad_norm": float(norm), "lr": rate, "entropy": entropy, "mismatch": mismatch}
        if self.reference:
            metrics["kl"] = kl_mean
        return {**metrics, "mismatch/max": float(worst), "bad_steps": self.bad_steps, "tokens/trained": divisor.tokens}

    def _token_loss(
        self, batch: GroupBatch, logprobs: Tensor, advantages: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Per-token loss [R, T] and, detached, the per-token k3 estimate of the KL to the reference."""
        algorithm = self.algorithm
        # One update a batch: the policy that acted is this one, so the old log-probs are these, without gradient.
        token_loss = losses.clipped(
            logprobs, logprobs.detach(), advantages[:, None], algorithm.clip_low, algorithm.clip_high
        )
        if self.reference is None:
            return token_loss, torch.zeros_like(token_loss)
        ref = self.reference.logprobs(batch, temperature)
        token_loss = token_loss + algorithm.kl.coef * losses.kl(logprobs, ref, algorithm.kl.estimator)
        return token_loss, losses.kl(logprobs.detach(), ref, "k3")

    def _apply(self, loss: float, norm: float, rate: float, step: int) -> None:
        if np.isfinite(loss) and np.isfinite(norm):
            self.bad_in_a_row = 0
            set_rate(self.optimizer, rate)
            self.optimizer.step()
        else:
            self.bad_steps += 1
            self.bad_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.bad_in_a_row >= self.config.learner.max_bad_steps:
            raise RunFailed(
                f"step {step + 1}: loss {loss:g} and gradient norm {norm:g}, not finite for "
                f"{self.bad_in_a_row} steps in a row; lower learner.lr or check the rewards' range"
            )

    def weights(self) -> tuple[None, np.ndarray]:
        """The trainable weights, flat, as the second of two values: from an actor it stays in the object store."""
        return None, self.policy.export_weights()

    def save_weights(self, path: str) -> None:
        save_file({name: p.detach().contiguous() for name, p in self.policy.trainable.items()}, path)

    def load_weights(self, path: str) -> None:
        """Put saved weights in place; the optimiser is left as it is."""
        saved = load_file(path, device=str(self.policy.device))
        with torch.no_grad():
            for name, p in self.policy.trainable.items():
                p.copy_(saved[name])

    def save_state(self, folder: str) -> None:
        """Everything an exact resume needs of the learner: weights, optimiser, counters, generator state."""
        self.save_weights(str(Path(folder) / "weights.safetensors"))
        tensors = {"rng": torch.get_rng_state()}
        for name, p in self.policy.trainable.items():
            for key, value in self.optimizer.state[p].items():
                if value is not None:
                    tensors[f"{key}/{name}"] = value.detach().contiguous()
        save_file(tensors, Path(folder) / "optimizer.safetensors")
        counters = {"bad_steps": self.bad_steps, "bad_in_a_row": self.bad_in_a_row}
        (Path(folder) / "learner.json").write_text(json.dumps(counters))

    def load_state(self, folder: str) -> None:
        self.load_weights(str(Path(folder) / "weights.safetensors"))
        tensors = load_file(Path(folder) / "optimizer.safetensors")
        torch.set_rng_state(tensors.pop("rng"))
        for key, value in tensors.items():
            kind, name = key.split("/", 1)
            p = self.policy.trainable[name]
            self.optimizer.state[p][kind] = value.to(p.device)
        for name, count in json.loads((Path(folder) / "learner.json").read_text()).items():
            setattr(self, name, count)

    def save_model(self, folder: str) -> None:
        """A folder that `transformers` loads."""
        self.policy.save_pretrained(folder)

    def supervise(self, prompts: list[np.ndarray], targets: list[list[str]], tokens: int) -> int:
        """Supervised training with the warm start's settings on about `tokens` target tokens; returns how many."""
        warm = self.config.warm_start
        examples = encode_examples(self.policy, prompts, targets, warm.max_target_tokens)
        return train_supervised(self.policy, examples, warm, self.config.trainer.seed + 1, tokens=tokens)


def _write_whole(table: pa.Table, path: Path) -> None:
    """Write a table as Parquet; the file appears whole or not at all."""
    aside = path.with_name(f".{path.name}.partial")
    pq.write_table(table, aside)
    os.replace(aside, path)


def _padded(rows: list[np.ndarray], batch: GroupBatch) -> Tensor:
    """Ragged rows laid out like the batch's mask [R, T], zeros where there is no token."""
    out = np.zeros(batch.mask.shape, dtype=rows[0].dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return torch.from_numpy(out)
