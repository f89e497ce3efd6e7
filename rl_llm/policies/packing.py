"""Groups packed for a forward pass: a shared prompt is read once for all its completions.

A row is `[prompt][completion 1]...[completion n]`. A block mask lets each completion see the prompt and itself only,
and positions restart after the prompt, so every log-prob equals that of the sample alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

_PROMPT, _PAD = 0, -1


@dataclass(frozen=True)
class Blocks:
    """What the block mask of packed groups leaves: a prompt looks at itself, a completion at its prompt and itself.

    P is the longest prompt, C the longest completion. Positions are flat indices into [B * S]; where a prompt or a
    completion is shorter, some position stands in that nobody looks at.

    Attributes:
        prompts: int64 [B, P], the positions of prompts.
        completions: int64 [R, C], of completions.
        keys: int64 [R, P + C], what completions may look at: their prompt, then themselves.
        prompt_mask: bool [1, 1, P, P], true where the second token may be looked at by the first.
        completion_mask: bool [R, 1, C, P + C], likewise.
        back: int64 [B * S], where each position is among those of `prompts` and then `completions`.
    """

    prompts: Tensor
    completions: Tensor
    keys: Tensor
    prompt_mask: Tensor
    completion_mask: Tensor
    back: Tensor

    def to(self, device: torch.device) -> "Blocks":
        return Blocks(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


@dataclass
class GroupBatch:
    """B packed groups with R samples in all.

    Attributes:
        rows: int64 [R], which row of the step's batch each sample is.
        input_ids, position_ids, segments: int64 [B, S]; segment 0 is the prompt, k the k-th completion, -1 padding.
        predictor: int64 [N], flat index into [B * S] of the state that predicts each completion token.
        targets: int64 [N], those tokens, sample after sample.
        mask: bool [R, T], where they stand in a right-padded table of samples.
    """

    rows: Tensor
    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    predictor: Tensor
    targets: Tensor
    mask: Tensor

    def attention_mask(self) -> Tensor:
        """bool [B, 1, S, S], true where the second token may be looked at by the first."""
        segment = self.segments
        length = segment.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        query, key = segment[:, :, None], segment[:, None, :]
        allowed = causal & ((key == _PROMPT) | (key == query))
        # Padding looks at itself: a row with nothing to look at would give NaN.
        return (allowed | torch.eye(length, dtype=torch.bool))[:, None]

    def blocks(self) -> Blocks:
        """The same as `attention_mask`, by blocks."""
        segment, mask = self.segments, self.mask
        positions = torch.arange(segment.numel()).view(segment.shape)
        lengths = (segment == _PROMPT).sum(dim=1)
        longest, width = int(lengths.max()), mask.shape[1]
        is_prompt = torch.arange(longest) < lengths[:, None]
        prompts = positions[:, :longest].where(is_prompt, 0)
        completions = self.layout(positions[segment > _PROMPT])
        row = completions[:, 0] // segment.shape[1]
        causal = torch.ones(max(longest, width), max(longest, width), dtype=torch.bool).tril()
        back = torch.zeros(segment.numel(), dtype=torch.int64)
        back[prompts[is_prompt]] = is_prompt.flatten().nonzero().squeeze(1)
        back[completions[mask]] = prompts.numel() + mask.flatten().nonzero().squeeze(1)
        return Blocks(
            prompts,
            completions,
            keys=torch.cat([prompts[row], completions], dim=1),
            # Right-padded, so that what is earlier is real wherever the token itself is.
            prompt_mask=causal[None, None, :longest, :longest],
            completion_mask=torch.cat(
                [is_prompt[row, None].expand(-1, width, -1), causal[:width, :width].expand(len(row), -1, -1)], dim=2
            )[:, None],
            back=back,
        )

    def layout(self, flat: Tensor) -> Tensor:
        """One value a completion token, [N] in the order of `targets`, as [R, T] with 0 where there is no token."""
        out = torch.zeros(self.mask.shape, dtype=flat.dtype, device=flat.device)
        return out.masked_scatter(self.mask.to(flat.device), flat)


@dataclass(frozen=True)
class PackedRow:
    """Samples of one prompt: their rows in the step's batch and their tokens."""

    rows: tuple[int, ...]
    prompt: np.ndarray
    completions: tuple[np.ndarray, ...]

    @property
    def tokens(self) -> int:
        return len(self.prompt) + sum(len(c) for c in self.completions)


def make_rows(
    group_ids: Sequence[int], prompts: Sequence[np.ndarray], completions: Sequence[np.ndarray], budget: int
) -> list[PackedRow]:
    """Rows gathered by group, those above the token budget cut; rows without tokens are left out."""
    members: dict[int, list[int]] = {}
    for row, group in enumerate(group_ids):
        if len(completions[row]):
            members.setdefault(int(group), []).append(row)
    wholes = (
        PackedRow(tuple(rows), prompts[rows[0]], tuple(completions[r] for r in rows)) for rows in members.values()
    )
    return [part for whole in wholes for part in cut_row(whole, budget)]


def cut_row(group: PackedRow, budget: int) -> list[PackedRow]:
    """The group in as few parts as the token budget takes, each with the prompt and at least one completion."""
    starts, size = [0], len(group.prompt)
    for at, completion in enumerate(group.completions):
        if at > starts[-1] and size + len(completion) > budget:
            starts.append(at)
            size = len(group.prompt)
        size += len(completion)
    ends = [*starts[1:], len(group.rows)]
    return [PackedRow(group.rows[a:b], group.prompt, group.completions[a:b]) for a, b in zip(starts, ends, strict=True)]


def microbatches(groups: list[PackedRow], budget: int) -> list[list[PackedRow]]:
    """Groups of similar length together, as many as fit the token budget with padding counted; at least one each."""
    batches: list[list[PackedRow]] = []
    longest = 0
    for group in sorted(groups, key=lambda g: (-g.tokens, g.rows)):
        if batches and longest * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(group)
        else:
            batches.append([group])
            longest = group.tokens
    return batches


def pack(groups: Sequence[PackedRow]) -> GroupBatch:
    """Lay out groups as one padded batch."""
    width = max(group.tokens for group in groups)
    samples = [completion for group in groups for completion in group.completions]
    input_ids = np.zeros((len(groups), width), dtype=np.int64)
    position_ids = np.zeros_like(input_ids)
    segments = np.full_like(input_ids, _PAD)
    mask = np.arange(max(len(c) for c in samples)) < np.array([len(c) for c in samples])[:, None]
    predictor = []
    for b, group in enumerate(groups):
        start = len(group.prompt)
        input_ids[b, :start] = group.prompt
        position_ids[b, :start] = np.arange(start)
        segments[b, :start] = _PROMPT
        at = start
        for k, completion in enumerate(group.completions, start=1):
            end = at + len(completion)
            input_ids[b, at:end] = completion
            position_ids[b, at:end] = np.arange(start, start + len(completion))
            segments[b, at:end] = k
            # The prompt's last token predicts the first token of every completion, then each token the next.
            predictor.append(b * width + np.concatenate([[start - 1], np.arange(at, end - 1)]))
            at = end
    return GroupBatch(
        rows=torch.tensor([row for group in groups for row in group.rows]),
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        segments=torch.from_numpy(segments),
        predictor=torch.from_numpy(np.concatenate(predictor)),
        targets=torch.from_numpy(np.concatenate(samples).astype(np.int64)),
        mask=torch.from_numpy(mask),
    )
