"""What an update minimises: the algorithm's loss, with what it has to know of policy, reference and values."""

import torch
from torch import Tensor

from rl_llm.algorithms import Algorithm
from rl_llm.algorithms import advantages as made
from rl_llm.algorithms.correction import correction
from rl_llm.algorithms.kl import KLCoefficient, kl
from rl_llm.algorithms.losses import Divisor, aggregate, value_loss
from rl_llm.config import AlgorithmConfig
from rl_llm.learner.batch import Batch
from rl_llm.learner.parallel import Parallel
from rl_llm.policies import PackedBatch, Policy, Reference, ValueFunction

REF_LOGPROBS = "ref_logprobs"


class Objective:
    """An algorithm at work on a policy.

    Attributes:
        reference, value: None where the algorithm does without.
        kl_coefficient: how much the KL counts now.
        sums: of token values, by name, over what has been trained on since they were last taken.
    """

    def __init__(self, algorithm: Algorithm, config: AlgorithmConfig, policy: Policy, parallel: Parallel) -> None:
        self.algorithm, self.config, self.policy, self.parallel = algorithm, config, policy, parallel
        self.uses_kl = config.kl.coef > 0
        self.reference = Reference(policy) if self.uses_kl else None
        self.value = ValueFunction(policy, config.value.model == "own") if algorithm.advantage == "gae" else None
        self.kl_coefficient = KLCoefficient(config.kl.coef, config.kl.target, config.kl.horizon)
        self.kl_in_reward = self.uses_kl and algorithm.kl_placement == "reward"
        self.clear()

    def clear(self) -> None:
        """Forget what has been noted since the last metrics."""
        names = ["entropy", "mismatch"]
        names += ["kl"] * self.uses_kl + ["clipped"]
        names += ["value/loss", "value/error", "value/error2", "value/return", "value/return2"] * (
            self.value is not None
        )
        names += ["correction/weight", "correction/kept"] * (self.config.correction.kind != "none")
        self.sums = {name: torch.zeros((), dtype=torch.float64) for name in names}
        self.worst = torch.zeros(())

    def begin(self, batch: Batch) -> None:
        """Before the first update of a run: values are what the first policy's samples came to, on the average.

        From there they have only differences to learn, and where all rewards are equal and gamma is 1 there is no
        advantage.
        """
        if self.value is not None:
            assert batch.outcomes is not None
            self.value.start_at(float(batch.outcomes.mean()))

    def prepare(self, batch: Batch, updates: int) -> None:
        """Everything that has to be known before the first of a step's updates; fills `batch.tokens`."""
        if updates > 1 or self.value is not None or self.kl_in_reward:
            self._look_back(batch)
        batch.tokens["advantages"] = self._advantages(batch)

    def _look_back(self, batch: Batch) -> None:
        """The log-probs of the policy that is about to change, of the reference, and values."""
        there = {"old_logprobs": True, "values": self.value is not None, REF_LOGPROBS: self.reference is not None}
        # Also where this learner has no rows: the others are to find their part of every sum.
        batch.tokens |= {name: torch.zeros(batch.mask.shape) for name in there if there[name]}
        with torch.no_grad():
            for part in batch.microbatches():
                temperature = batch.temperature[part.rows]
                forward = self.policy.forward(part, temperature)
                batch.put("old_logprobs", part, forward.logprobs)
                if self.value is not None:
                    batch.put("values", part, self.value.values(part, forward.states))
                if self.reference is not None:
                    batch.put(REF_LOGPROBS, part, self.reference.logprobs(part, temperature))

    def _advantages(self, batch: Batch) -> Tensor:
        """float32 [N, T]; those of the algorithm, with the KL in them where it is part of the reward."""
        algorithm, mask = self.algorithm, batch.mask & batch.mine[:, None]
        penalty = torch.zeros(mask.shape)
        if self.kl_in_reward:
            distance = kl(batch.tokens["old_logprobs"], batch.tokens[REF_LOGPROBS], algorithm.kl_estimator)
            penalty = torch.where(mask, self.kl_coefficient.value * distance, 0.0)
        if not algorithm.per_token:
            of_rows = batch.advantages
            if self.kl_in_reward:
                # These estimators are linear in the reward, so the KL's part can be added afterwards.
                lost = self.parallel.total(penalty.sum(dim=1, dtype=torch.float64))
                of_rows = of_rows - algorithm.estimator(lost, batch.groups, torch.ones_like(batch.mine))
            advantages = of_rows.float()[:, None].expand(mask.shape)
        else:
            assert batch.outcomes is not None
            rewards = made.token_rewards(batch.outcomes.float(), batch.mask) - penalty
            if self.value is None:
                advantages = made.discounted_returns(rewards, mask, algorithm.gamma)
            else:
                values = batch.tokens["values"]
                advantages = made.gae(rewards, values, mask, algorithm.gamma, algorithm.lam)
                batch.tokens["returns"] = advantages + values
        return made.whiten(advantages, mask, self.parallel.total) if algorithm.whiten else advantages

    def loss(self, batch: Batch, part: PackedBatch, divisor: Divisor) -> Tensor:
        """The part of an update's loss that a micro-batch makes up: a scalar that sums over them."""
        algorithm, config, device = self.algorithm, self.config, self.policy.device
        forward = self.policy.forward(part, batch.temperature[part.rows], entropy=config.entropy_coef > 0)
        logprobs, mask = forward.logprobs, batch.take("mask", part, device)
        # In a step's only update the policy that acted is this one: its log-probs are these, without gradient.
        looked_back = "old_logprobs" in batch.tokens
        old = batch.take("old_logprobs", part, device) if looked_back else logprobs.detach()
        engine = batch.take("engine_logprobs", part, device)
        token_loss, outside = algorithm.loss(logprobs, old, batch.take("advantages", part, device), mask)
        if config.correction.kind != "none":
            weight = correction(old, engine, mask, config.correction.kind, *algorithm.correction_bounds)
            token_loss = token_loss * weight
            self._note("correction/weight", weight, mask)
            self._note("correction/kept", (weight > 0).float(), mask)
        if self.uses_kl:
            ref = self._ref_logprobs(batch, part)
            if algorithm.kl_placement == "loss":
                token_loss = token_loss + self.kl_coefficient.value * kl(logprobs, ref, algorithm.kl_estimator)
            self._note("kl", kl(logprobs.detach(), ref, "k3"), mask)
        if forward.entropy is not None:
            token_loss = token_loss - config.entropy_coef * forward.entropy
        self._note("entropy", -logprobs if forward.entropy is None else forward.entropy, mask)
        self._note("clipped", outside.float(), mask)
        gap = torch.where(mask, (old - engine).abs(), 0.0)
        self._note("mismatch", gap, mask)
        self.worst = torch.maximum(self.worst, gap.max().cpu())
        loss = aggregate(token_loss, mask, algorithm.aggregation, divisor)
        if self.value is not None:
            loss = loss + config.value.coef * self._value_loss(batch, part, forward.states, mask, divisor)
        return loss

    def _ref_logprobs(self, batch: Batch, part: PackedBatch) -> Tensor:
        if REF_LOGPROBS in batch.tokens:
            return batch.take(REF_LOGPROBS, part, self.policy.device)
        assert self.reference is not None
        return self.reference.logprobs(part, batch.temperature[part.rows])

    def _value_loss(self, batch: Batch, part: PackedBatch, states: Tensor, mask: Tensor, divisor: Divisor) -> Tensor:
        assert self.value is not None
        old, returns = (batch.take(name, part, self.policy.device) for name in ("values", "returns"))
        loss = value_loss(self.value.values(part, states), old, returns, self.config.value.clip)
        self._note("value/loss", loss, mask)
        for name, values in (("value/error", returns - old), ("value/return", returns)):
            self._note(name, values, mask)
            self._note(f"{name}2", values**2, mask)
        return aggregate(loss, mask, "token_mean", divisor)

    def _note(self, name: str, values: Tensor, mask: Tensor) -> None:
        self.sums[name] += torch.where(mask, values.detach(), 0.0).sum(dtype=torch.float64).cpu()

    def metrics(self, tokens: int, samples: int, updates: int) -> dict[str, float]:
        """Means over the `tokens` trained on, all updates counted, of all learners; then begins anew.

        Moves the KL's coefficient, if it has a target, by the mean k3 estimate of `samples` sequences.
        """
        totals = self.parallel.total(torch.stack(list(self.sums.values()))) / tokens
        means = dict(zip(self.sums, totals.tolist(), strict=True))
        means["mismatch/max"] = float(self.parallel.highest(self.worst))
        self.clear()
        # Without a second update no ratio has left 1.
        clipped = means.pop("clipped")
        if updates > 1:
            means["clip_fraction"] = clipped
        if self.uses_kl:
            means["kl/coef"] = self.kl_coefficient.value
            self.kl_coefficient.update(means["kl"], samples)
        if self.value is not None:
            left, spread = (means.pop(f"value/{x}2") - means.pop(f"value/{x}") ** 2 for x in ("error", "return"))
            means["value/explained"] = 1 - left / spread if spread > 0 else 0.0
        return means
