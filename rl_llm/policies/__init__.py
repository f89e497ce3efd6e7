"""What acts: language models as policies."""

from rl_llm.policies.causal_lm import CausalLM

__all__ = ["CausalLM"]
