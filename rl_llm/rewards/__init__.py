"""Rewards: components, their registry, what becomes of failures. Importing this registers the built-in ones."""

from rl_llm.rewards.answers import exact_match, token_f1
from rl_llm.rewards.cache import SCORES, Cache, cache_folders
from rl_llm.rewards.component import FAILED, GIVE_UP_AFTER, Component, Scores, deadline_s
from rl_llm.rewards.facts import Facts
from rl_llm.rewards.failures import Resolved, RewardFailed, apply_failure_policies, apply_failure_policy, imputed
from rl_llm.rewards.form import Length, regex, vocab
from rl_llm.rewards.overlap import bleu, chrf, rouge, ter
from rl_llm.rewards.registry import Registered, Takes, known, resolve, reward
from rl_llm.rewards.sentiment import sentiment
from rl_llm.rewards.worker import RewardWorker

__all__ = [
    "FAILED",
    "GIVE_UP_AFTER",
    "SCORES",
    "Cache",
    "Component",
    "Facts",
    "Length",
    "Registered",
    "Resolved",
    "RewardFailed",
    "RewardWorker",
    "Scores",
    "Takes",
    "apply_failure_policies",
    "apply_failure_policy",
    "bleu",
    "cache_folders",
    "chrf",
    "deadline_s",
    "exact_match",
    "imputed",
    "known",
    "regex",
    "resolve",
    "reward",
    "rouge",
    "sentiment",
    "ter",
    "token_f1",
    "vocab",
]
