"""Rewards: components, their registry, and the mixture. Importing this registers the built-in components."""

from rl_llm.mixture import Mixed, Mixture
from rl_llm.rewards.answers import exact_match, token_f1
from rl_llm.rewards.component import FAILED, GIVE_UP_AFTER, Component, Scores, deadline_s
from rl_llm.rewards.failures import RewardFailed, Settled, apply_policy, filled, settle
from rl_llm.rewards.form import Length, regex, vocab
from rl_llm.rewards.overlap import bleu, chrf, rouge, ter
from rl_llm.rewards.registry import Registered, known, resolve, reward
from rl_llm.rewards.sentiment import sentiment
from rl_llm.rewards.worker import RewardWorker

__all__ = [
    "FAILED",
    "GIVE_UP_AFTER",
    "Component",
    "Length",
    "Mixed",
    "Mixture",
    "Registered",
    "RewardFailed",
    "RewardWorker",
    "Scores",
    "Settled",
    "apply_policy",
    "bleu",
    "chrf",
    "deadline_s",
    "exact_match",
    "filled",
    "known",
    "regex",
    "resolve",
    "reward",
    "rouge",
    "sentiment",
    "settle",
    "ter",
    "token_f1",
    "vocab",
]
