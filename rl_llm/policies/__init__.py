"""What acts: language models as policies."""

from rl_llm.policies.causal_lm import CausalLM, freeze

__all__ = ["CausalLM", "freeze"]
