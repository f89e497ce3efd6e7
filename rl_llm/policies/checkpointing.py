"""Gradient checkpointing without train mode: activations are made again, and nothing else changes."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rl_llm.errors import UserError


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Have the layers keep their inputs only, while in train mode. Raises `UserError` for a model that cannot."""
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    except ValueError:
        raise UserError(
            f"policy.gradient_checkpointing: {model.config.model_type} has none; leave it out, or take another model"
        ) from None


@contextlib.contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Within, layers are checkpointed in eval mode.

    The library asks a layer's train mode whether to. All that goes by it otherwise, such as jitter of a router or
    dropout that a layer reads from its settings, would come with it.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.training, layer._gradient_checkpointing_func = True, partial(_checkpoint, layer)
    try:
        yield
    finally:
        for layer in layers:
            layer.training, layer._gradient_checkpointing_func = False, partial(checkpoint, use_reentrant=False)


def _checkpoint(layer: nn.Module, run: Callable[..., Any], *args: Any) -> Any:
    def in_eval_mode(*args: Any) -> Any:
        layer.training = False
        try:
            return run(*args)
        finally:
            layer.training = True

    return checkpoint(in_eval_mode, *args, use_reentrant=False)
