"""Reinforcement learning of language models with mixtures of rewards."""
