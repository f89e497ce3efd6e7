"""A kind of policy of one's own, on a page: it answers a text with "yes" or "no"; an action is one label."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification

from rl_llm.policies import Actions, Forward, PackedRow, Policy, SamplingParams
from rl_llm.policies.sampling import uniforms

LABELS = ("no", "yes")


@dataclass
class Labelled:
    """R samples of B texts; `text` says of each sample which, so that a text is read once for all its samples."""

    rows: Tensor
    mask: Tensor
    texts: list[np.ndarray]
    text: Tensor
    labels: Tensor

    def layout(self, flat: Tensor) -> Tensor:
        return flat[:, None]


class TwoLabels(Policy):
    auto_class = AutoModelForSequenceClassification
    task_type: ClassVar[str] = "SEQ_CLS"

    def sample(self, prompts: Sequence[np.ndarray], sample_ids: np.ndarray, params: SamplingParams) -> Actions:
        with self.acting():
            logits = self.unwrapped.classifier(self._pooled(prompts)).float()
        logp = (logits / (params.temperature or 1.0)).log_softmax(dim=1).repeat_interleave(params.samples_per_prompt, 0)
        drawn = uniforms(params.seed, sample_ids, 1)[:, 0] > logp[:, 0].exp()
        labels = (drawn if params.temperature else logp[:, 0] < logp[:, 1]).long()
        chosen = logp.gather(1, labels[:, None]).numpy()
        return Actions(
            ids=list(labels[:, None].numpy()),
            logprobs=list(chosen),
            log_kept_mass=list(np.zeros_like(chosen)),
            texts=[LABELS[label] for label in labels],
            finish=["stop"] * len(labels),
        )

    def pack(self, rows: Sequence[PackedRow]) -> Labelled:
        samples = [row for group in rows for row in group.rows]
        text = np.repeat(np.arange(len(rows)), [len(group.rows) for group in rows])
        labels = np.concatenate([completion for group in rows for completion in group.completions])
        return Labelled(
            torch.tensor(samples),
            torch.ones(len(samples), 1, dtype=torch.bool),
            [group.prompt for group in rows],
            torch.from_numpy(text),
            torch.from_numpy(labels.astype(np.int64)),
        )

    def forward(self, batch: Labelled, temperature: Tensor | float, entropy: bool = False) -> Forward:
        states = self._pooled(batch.texts)[batch.text]
        divisor = torch.as_tensor(temperature, dtype=torch.float32).expand(len(states))[:, None]
        logp = (self.unwrapped.classifier(states).float() / divisor).log_softmax(dim=1)
        entropies = -(logp.exp() * logp).sum(dim=1, keepdim=True) if entropy else None
        return Forward(logp.gather(1, batch.labels[:, None]), entropies, states)

    def encode_targets(self, targets: Sequence[str], limit: int) -> list[np.ndarray]:
        return [np.array([LABELS.index(target)]) for target in targets]

    def _pooled(self, texts: Sequence[np.ndarray]) -> Tensor:
        ids = pad_sequence([torch.from_numpy(text.astype(np.int64)) for text in texts], batch_first=True)
        lengths = torch.tensor([len(text) for text in texts])
        real = torch.arange(ids.shape[1]) < lengths[:, None]
        return self.unwrapped.bert(input_ids=ids, attention_mask=real.long()).pooler_output
