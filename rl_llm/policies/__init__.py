"""What acts: language models as policies."""

from rl_llm.policies.causal_lm import CausalLM, check_attention, freeze
from rl_llm.policies.reference import Reference
from rl_llm.policies.value import ValueFunction

__all__ = ["CausalLM", "Reference", "ValueFunction", "check_attention", "freeze"]
