"""What acts and learns: kinds of policies, by the name that `policy.type` gives them."""

from pathlib import Path

from rl_llm.config import PolicyConfig
from rl_llm.errors import UserError, did_you_mean
from rl_llm.imports import import_function
from rl_llm.policies.base import Actions, Forward, PackedBatch, Policy
from rl_llm.policies.causal_lm import CausalLM
from rl_llm.policies.packing import PackedRow
from rl_llm.policies.reference import Reference
from rl_llm.policies.sampling import SamplingParams
from rl_llm.policies.value import ValueFunction

__all__ = [
    "POLICIES",
    "Actions",
    "CausalLM",
    "Forward",
    "PackedBatch",
    "PackedRow",
    "Policy",
    "Reference",
    "SamplingParams",
    "ValueFunction",
    "load_policy",
    "policy_class",
]

POLICIES: dict[str, type[Policy]] = {"causal_lm": CausalLM}


def policy_class(config: PolicyConfig) -> type[Policy]:
    """The kind of policy that a config names: one of `POLICIES`, or a class of the user's own.

    Raises:
        UserError: no such kind.
    """
    if ":" in config.type:
        found = import_function(config.type, "policy.type")
        if not (isinstance(found, type) and issubclass(found, Policy)):
            raise UserError(f"policy.type {config.type!r} is no class made from rl_llm.policies.Policy")
        return found
    if config.type not in POLICIES:
        hint = did_you_mean(config.type, POLICIES)
        raise UserError(f"policy.type {config.type!r}: {hint}, or package.module:Class")
    return POLICIES[config.type]


def load_policy(folder: str | Path, config: PolicyConfig) -> Policy:
    """The policy in a folder (or Hub name). Raises `UserError` where there is none of the kind."""
    return policy_class(config)(folder, config)
