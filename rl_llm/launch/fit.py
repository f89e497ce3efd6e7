"""Whether a model fits its task: the tokens it reads, how far it counts, and weights that are numbers."""

from pathlib import Path

import pyarrow.compute as pc
from accelerate import init_empty_weights
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rl_llm.config import PolicyConfig, RunConfig
from rl_llm.errors import UserError
from rl_llm.policies import CausalLM, policy_class
from rl_llm.policies.folder import first_not_finite, generation_settings, savable, stored_weights, weight_files
from rl_llm.policies.loading import read_architecture, unloadable
from rl_llm.policies.probe import Probe, probe
from rl_llm.policies.scratch import scratch_settings
from rl_llm.tasks import Task

# Bytes of weights that are read for a look before a start. Larger ones are looked at where they are loaded anyway.
LOOKED_AT = 16 * 2**30


def architecture(policy: PolicyConfig) -> PreTrainedConfig:
    """The settings of the policy's model, given or to be built."""
    if policy.model is None:
        return scratch_settings(policy.scratch, policy.scratch.vocab_size, 0)
    return read_architecture(policy.model)


def without_weights(policy: PolicyConfig) -> PreTrainedModel:
    """The policy's model as an empty shape. Raises `UserError` where its kind cannot use it."""
    kind = policy_class(policy)
    with init_empty_weights():
        try:
            model: PreTrainedModel = kind.auto_class.from_config(architecture(policy))
        except UserError:
            raise
        except Exception as error:  # what an architecture makes of its settings
            raise unloadable(str(policy.model), error) from None
    kind.check_model(model)
    model.tie_weights()  # shared weights count once
    return model


def check_fit(
    config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, imitates: bool
) -> list[str]:
    """What is worth a note of a given model on a task with tokens.

    Args:
        imitates: whether targets of `warm_start.target` are read too.

    Raises:
        UserError: tokens without an embedding, more positions than the model has, weights that are no numbers.
    """
    targets = [text for _, texts in task.training_texts(config.warm_start.target) for text in texts] if imitates else []
    _check_tokens(config.policy, model, tokenizer, task, targets)
    notes = _check_positions(config, model, task, imitates)
    _check_weights(config.policy, model)
    return notes


def probe_policy(config: RunConfig, parameters: int, task: Task) -> Probe | None:
    """How far a given model's policy is from the model itself; None for a kind of the user's own.

    A model from scratch is a Llama, which needs none.

    Args:
        parameters: how many the model has.
        task: with tokens.

    Raises:
        UserError: too far, samples too long for the model, or it cannot be used at all.
    """
    kind, model = policy_class(config.policy), config.policy.model
    if model is None or not issubclass(kind, CausalLM):
        return None
    return probe(kind, model, config.policy, parameters, _longest(task) + config.rollout.max_new_tokens)


def saving_notes(model: PreTrainedModel, name: str) -> list[str]:
    """What the saved model will have other than the given one of this name. Raises `UserError` as loading it would."""
    if not model.can_generate():
        return []
    try:
        _, changed = savable(generation_settings(name))
    except (OSError, ValueError) as error:
        raise unloadable(name, error) from None
    return [changed] if changed else []


def _check_tokens(
    policy: PolicyConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, targets: list[str]
) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= rows:
        return

    def refuse(token: int, where: str) -> None:
        if token >= rows:
            raise UserError(
                f"policy.model {policy.model}: {where} its tokenizer has token {token}, {tokenizer.decode([token])!r}, "
                f"but its embedding has {rows} rows; take the tokenizer that belongs to it, or resize the embedding"
            )

    for table in task.splits.values():
        for prompt_id, ids in zip(table["prompt_id"].to_pylist(), table["prompt_ids"].to_pylist(), strict=True):
            refuse(max(ids), f"in the prompt of {task.name}:{task.lines[prompt_id]}")
    for ids in tokenizer(targets, add_special_tokens=False)["input_ids"] if targets else []:
        refuse(max(ids, default=0), "in a target")
    if tokenizer.eos_token_id is not None:
        refuse(tokenizer.eos_token_id, "to end with")


def _check_positions(config: RunConfig, model: PreTrainedModel, task: Task, imitates: bool) -> list[str]:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None:
        return []
    longest = _longest(task)
    written = {"rollout.max_new_tokens": config.rollout.max_new_tokens}
    if imitates:
        written["warm_start.max_target_tokens"] = config.warm_start.max_target_tokens
    if not policy_class(config.policy).continues:
        written = {"task.max_prompt_tokens": 0}  # what it answers has no position behind the prompt
    key, new = max(written.items(), key=lambda item: item[1])
    if longest + new <= limit:
        return []
    behind = f" and {key} {new}" if new else ""
    problem = f"prompts of up to {longest} tokens{behind} are more than the {limit} positions the model has"
    if _learned_positions(model, limit):
        raise UserError(f"{problem} learned; lower {' or '.join(dict.fromkeys((key, 'task.max_prompt_tokens')))}")
    return [f"{problem} been made for; what it writes beyond them may be poor"]


def _longest(task: Task) -> int:
    """Tokens of the longest prompt."""
    return max(pc.max(pc.list_value_length(table["prompt_ids"])).as_py() for table in task.splits.values())


def _learned_positions(model: PreTrainedModel, limit: int) -> bool:
    """Whether positions are rows of a table, which has one for each and sometimes a few in front."""
    tokens = model.get_input_embeddings()
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding) and module is not tokens)
    return any(limit <= table.num_embeddings <= limit + 2 for table in tables)


def _check_weights(policy: PolicyConfig, model: PreTrainedModel) -> None:
    folder = Path(str(policy.model))
    if sum(file.stat().st_size for file in weight_files(folder) if file.is_file()) > LOOKED_AT:
        return
    # Buffers, such as masks, may be infinite.
    names = {name for name, _ in model.named_parameters()}
    names |= {name.removeprefix(f"{model.base_model_prefix}.") for name in names}
    try:
        broken = first_not_finite((name, weight) for name, weight in stored_weights(folder) if name in names)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise unloadable(str(policy.model), error) from None
    if broken is not None:
        raise UserError(f"policy.model {policy.model!r}: the weight {broken} holds NaN or infinite values")
