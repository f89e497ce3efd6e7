"""Weights and settings of a model, whichever way its folder keeps them."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from rl_llm.errors import UserError

_UNLOADABLE = (OSError, ValueError, RuntimeError, ImportError, SafetensorError)


def adapter_base(model: str) -> str | None:
    """The model that an adapter was made for, which it is merged into; None where `model` is no adapter.

    Raises:
        UserError: its settings do not say, or it is one that cannot be merged.
    """
    if find_adapter_config_file(model) is None:
        return None
    import peft

    try:
        settings = peft.PeftConfig.from_pretrained(model)
    except Exception as error:  # whatever stands in the file
        raise unloadable(model, error) from None
    if settings.is_prompt_learning or not settings.base_model_name_or_path:
        what = f"a {settings.peft_type}" if settings.is_prompt_learning else "without base_model_name_or_path"
        raise UserError(f"policy.model {model!r}: an adapter {what} cannot be merged into a model")
    return str(settings.base_model_name_or_path)


def read_architecture(model: str) -> PreTrainedConfig:
    """A model's settings. Raises `UserError` where there are none, or its weights are quantised."""
    base = adapter_base(model)
    try:
        settings = AutoConfig.from_pretrained(base or model, trust_remote_code=False)
    except Exception as error:  # classes of settings check them in ways of their own
        raise unloadable(f"{model}, an adapter of {base}" if base else model, error) from None
    quantised = getattr(settings, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise UserError(
            f"policy.model {(base or model)!r}: its weights are quantised with {getattr(method, 'value', method)}, and "
            "what trains is fp32: take the model they were made from, or load them with that library and save what "
            "model.dequantize() leaves"
        )
    return settings


def load_model(auto_class: Any, model: str, settings: PreTrainedConfig) -> PreTrainedModel:
    """A model with these settings and fp32 weights; an adapter is merged into the model it was made for.

    Args:
        auto_class: what `transformers` loads it with.

    Raises:
        UserError: there is no such model, or it cannot be loaded.
    """
    base = adapter_base(model)
    try:
        loaded: PreTrainedModel = auto_class.from_pretrained(
            base or model, config=settings, dtype=torch.float32, trust_remote_code=False
        )
        if base is not None:
            import peft

            merged: Any = peft.PeftModel.from_pretrained(loaded, model)
            loaded = merged.merge_and_unload()
    except _UNLOADABLE as error:
        raise unloadable(model, error) from None
    return loaded


def tokenizer_source(model: str) -> str:
    """Where a model's tokenizer is: an adapter saved without one has that of the model it was made for."""
    if (Path(model) / "tokenizer_config.json").is_file():
        return model
    return adapter_base(model) or model


def unloadable(model: str, error: Exception, what: str = "", otherwise: str = "") -> UserError:
    """A line for what `transformers` raised on a model, with the remedy that there is here.

    Args:
        what: of the model could not be loaded, such as "its tokenizer".
        otherwise: the remedy of a failure that is not known.
    """
    text = str(error)
    if "trust_remote_code" in text:
        return UserError(
            f"policy.model {model!r} comes with code of its own, which is not run; have a module of yours register its "
            "classes (AutoConfig.register, AutoModelForCausalLM.register), and name a class made from "
            "rl_llm.policies.CausalLM in it: policy.type=package.module:Class"
        )
    if "couldn't connect" in text or "offline" in text.lower():
        return UserError(
            f"policy.model {model!r} is not in the Hub's cache here, and the Hub cannot be reached; give the folder of "
            "a copy, or set HF_HOME to a cache that has it"
        )
    of_it, remedy = what and f": {what}", otherwise and f"; {otherwise}"
    return UserError(f"policy.model {model!r}{of_it} cannot be loaded: {first_line(error)}{remedy}")


def first_line(error: Exception) -> str:
    """What an error says in a line; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
