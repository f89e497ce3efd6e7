"""What a run is about to do, checked before anything starts: data, components, model, actors, memory."""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from rl_llm.algorithms import build_algorithm
from rl_llm.config import PolicyConfig, RunConfig
from rl_llm.errors import UserError
from rl_llm.launch.fit import architecture, check_fit, probe_policy, saving_notes, without_weights
from rl_llm.launch.origin import origin_of
from rl_llm.launch.warm_start import base_path, cache_folder, needs_base
from rl_llm.policies import policy_class
from rl_llm.policies.base import freeze
from rl_llm.policies.loading import read_architecture, tokenizer_source, unloadable
from rl_llm.policies.probe import Probe
from rl_llm.rewards import Component, known
from rl_llm.rollout.engines import engine_maker
from rl_llm.runs.text import short
from rl_llm.tasks import Task, load_task
from rl_llm.trainer.state import Origin

GIB = 2**30

# What a config says of rows and functions that were handed over in Python.
ROWS = "rows"
FUNCTION = "function:"


@dataclass
class Plan:
    """A run that can start.

    Attributes:
        task: loaded, and tokenized where the model is there already.
        functions: components that travel to reward workers as they are, by name.
        parameters: of the policy, all of them and the trainable ones.
        tokenizer: the model's; None for one that is built with it.
        notes: what is no reason not to start, and good to know.
        origin: what the run is made from.
        probe: of a given model; None where there is nothing to compare a policy with.
    """

    config: RunConfig
    task: Task
    functions: Mapping[str, Callable[..., Any]]
    parameters: tuple[int, int]
    tokenizer: PreTrainedTokenizerBase | None
    notes: list[str]
    origin: Origin
    probe: Probe | None


def make_plan(config: RunConfig, functions: Mapping[str, Callable[..., Any]], task: Task | None = None) -> Plan:
    """Load what has to be there and check that it fits together.

    Raises:
        UserError: unreadable data, an unknown component, a missing column or model, an impossible combination.
    """
    quiet_libraries()
    check_algorithm(config)
    engine_maker(config.rollout.engine)
    tokenizer = check_model(config.policy)
    task = task or read_task(config)
    functions = {**registered_here(config), **functions}
    check_components(config, functions, task)
    imitates = needs_base(config) or "supervised" in config.evaluation.controls
    if imitates:
        task.training_texts(config.warm_start.target)
    if needs_base(config) and not base_path(config, task).is_dir():
        refuse_unwritable(cache_folder(), "set RL_LLM_CACHE to a folder that can")
    model = without_weights(config.policy)
    parameters = model.num_parameters()
    notes: list[str] = []
    origin = origin_of(config, task, functions)  # of all rows, whichever will be too long
    probed = None
    if tokenizer is not None:
        task.tokenize(tokenizer, policy_class(config.policy).continues)
        notes = [*check_fit(config, model, tokenizer, task, imitates), *saving_notes(model, str(config.policy.model))]
        probed = probe_policy(config, parameters, task)
    counts = parameters, _trainable(config.policy, model)
    return Plan(config, task, functions, counts, tokenizer, notes, origin, probed)


def quiet_libraries() -> None:
    """Models are loaded without the library's bars and warnings."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


def refuse_unwritable(folder: Path, remedy: str) -> None:
    """Raise `UserError` where nothing could be written to a folder, which may be still to be made."""
    try:
        there = next(place for place in (folder, *folder.parents) if place.exists())
        with tempfile.NamedTemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}); {remedy}") from None


def check_algorithm(config: RunConfig) -> None:
    """Raise `UserError` where the algorithm's settings do not go together, or not with the size of a step."""
    rollout, minibatches = config.rollout, config.learner.minibatches
    algorithm = build_algorithm(config.algorithm)
    if algorithm.resample and rollout.samples_per_prompt < 2:
        raise UserError(
            "rollout.samples_per_prompt 1: algorithm.resample looks for prompts whose samples differ in reward; take 2 "
            "or more, or algorithm.resample=0"
        )
    if not algorithm.per_token and rollout.samples_per_prompt < 2:
        raise UserError(
            f"rollout.samples_per_prompt 1: the advantage {algorithm.advantage} compares the samples of a prompt; take "
            "2 or more, or algorithm.advantage=gae or returns"
        )
    if not algorithm.per_token and algorithm.advantage != "grpo" and config.rewards.combine == "normalize_then_sum":
        raise UserError(
            f"rewards.combine=normalize_then_sum divides by spreads, which the advantage {algorithm.advantage} does "
            "not; take algorithm.advantage=grpo, or rewards.combine=sum_then_normalize"
        )
    if config.rewards.controller and config.rewards.controller.kind == "hypervolume":
        beside_kl = config.algorithm.kl.coef > 0 and algorithm.kl_placement == "reward"
        whitened = algorithm.per_token and algorithm.whiten and not beside_kl
        if algorithm.advantage == "grpo" or whitened or config.rewards.combine == "normalize_then_sum":
            raise UserError(
                "rewards.controller.kind=hypervolume multiplies all weights by one number, which these advantages "
                "divide out again; take algorithm.name=dr_grpo or rloo, and rewards.combine=sum_then_normalize"
            )
    if minibatches > rollout.prompts_per_step:
        raise UserError(
            f"learner.minibatches {minibatches}: a minibatch takes whole groups, and rollout.prompts_per_step is "
            f"{rollout.prompts_per_step}; lower one or raise the other"
        )


def registered_here(config: RunConfig) -> dict[str, Callable[..., Any]]:
    """Components under ids that this process has registered itself, by name: a worker knows built-in ids only."""
    registered = known()
    components = config.measured
    targets = {name: registered[spec.use].target for name, spec in components.items() if spec.use in registered}
    return {name: target for name, target in targets.items() if not target.__module__.startswith("rl_llm.rewards.")}


def read_task(config: RunConfig) -> Task:
    """The task that the config names. Raises `UserError` as `load_task`, and for rows that only Python can give."""
    if config.task.data == ROWS:
        raise UserError("this run's rows were given in Python: go on with it there, or set task.data to a file of them")
    return load_task(config.task, config.trainer.seed)


def check_components(config: RunConfig, functions: Mapping[str, Callable[..., Any]], task: Task) -> None:
    """Raise `UserError` where a component is unknown, does not take its arguments or a value, or lacks a column."""
    for name, component in config.measured.items():
        if component.use.startswith(FUNCTION) and name not in functions:
            raise UserError(
                f"component {name!r} was a function given in Python: go on there, or set "
                f"rewards.components.{name}.use=package.module:function"
            )
        built = Component(name, component, functions.get(name))
        built.check_columns(task.fields)
        for table in task.splits.values():
            if found := built.misread(table):
                row, problem = found
                raise UserError(f"{task.place(table['prompt_id'][row].as_py())}: {problem}")
    if config.resources.num_reward_workers:
        for name, function in functions.items():
            _check_it_travels(name, function)


def _check_it_travels(name: str, function: Callable[..., Any]) -> None:
    """Raise `UserError` where a component cannot be sent to reward workers."""
    import ray.cloudpickle

    try:
        ray.cloudpickle.dumps(function)
    except Exception as error:  # whatever an object's own way of being pickled raises
        raise UserError(
            f"component {name!r} cannot be sent to reward workers ({type(error).__name__}: {error}): have it open what "
            "it holds in the setup() of a class, or set resources.num_reward_workers=0"
        ) from None


def check_model(policy: PolicyConfig) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a given model. Raises `UserError` where that is not there, or lacks weights or a tokenizer."""
    kind, model = policy_class(policy), policy.model
    if model is None:
        return None
    path = Path(model)
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise UserError(f"policy.model: {model} is no model folder (it has no config.json)")
        if not any(file.suffix in (".safetensors", ".bin") for file in path.iterdir()):
            raise UserError(f"policy.model: {model} has no weights (*.safetensors or *.bin)")
    elif path.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise UserError(
            f"policy.model: there is no folder {model}; give a Hugging Face folder or a Hub name owner/name"
        )
    read_architecture(model)
    tokenizer = load_tokenizer(model)
    kind.check_tokenizer(tokenizer, model)
    return tokenizer


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer. Raises `UserError` where it has none."""
    try:
        return AutoTokenizer.from_pretrained(tokenizer_source(model), trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises Exception itself
        remedy = "tokenizer.json and tokenizer_config.json belong to the model"
        raise unloadable(model, error, "its tokenizer", remedy) from None


def _trainable(policy: PolicyConfig, model: PreTrainedModel) -> int:
    """How many parameters train, from the model's shape alone."""
    frozen = freeze(model, policy, policy_class(policy).task_type)
    return sum(p.numel() for p in frozen.parameters() if p.requires_grad)


def describe(plan: Plan) -> list[str]:
    """The plan in lines: task, policy, actors with their resources, memory."""
    config, task = plan.config, plan.task
    total, trainable = plan.parameters
    splits = ", ".join(f"{table.num_rows} {split}" for split, table in task.splits.items())
    rollout = config.rollout
    rows = rollout.prompts_per_step * rollout.samples_per_prompt
    source = config.policy.model or "built from scratch"
    weights = ", ".join(f"{name}={weight}" for name, weight in config.rewards.weights.items())
    moved = f", moved by {config.rewards.controller.kind}" if config.rewards.controller else ""
    lines = [
        f"task       {task.name}: {splits} prompts",
        *([f"warning    {overlap}"] if (overlap := task.overlap()) else []),
        f"policy     {source}: {short(total)} parameters, {short(trainable)} of them train ({config.policy.trainable})",
        *_first_prompt(plan),
        *([f"probe      {plan.probe}"] if plan.probe else []),
        f"rewards    {weights} ({config.rewards.combine}{moved})",
        f"step       {rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} samples in requests of "
        f"{rollout.request_rows} rows, {-(-rows // rollout.request_rows)} a step; "
        f"{config.algorithm.name}, lr {config.learner.lr:g}",
        *(f"actor      {line}" for line in _actors(config)),
        f"memory     about {memory_estimate(config, plan.parameters) / GIB:.1f} GiB in all processes, Ray's own aside",
        *(f"note       {note}" for note in plan.notes),
    ]
    return lines


def _first_prompt(plan: Plan) -> list[str]:
    """The first training prompt as the policy gets it: its text, special tokens included, and its token ids."""
    if plan.tokenizer is None:
        return []
    ids = plan.task.splits["train"]["prompt_ids"][0].as_py()
    text = plan.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    shown = ids if len(ids) <= 24 else [*ids[:16], "...", *ids[-8:]]
    return [
        f"prompt     {(text if len(text) <= 200 else f'{text[:140]} ... {text[-60:]}')!r}",
        f"tokens     {len(ids)}: {' '.join(map(str, shown))}",
    ]


def _actors(config: RunConfig) -> list[str]:
    resources = config.resources
    lines = []
    for kind in ("learner", "rollout_worker", "reward_worker"):
        count = getattr(resources, f"num_{kind}s")
        cpus, gpus = getattr(resources, f"num_cpus_per_{kind}"), getattr(resources, f"num_gpus_per_{kind}", 0)
        name = kind.replace("_", " ")
        if count:
            lines.append(f"{count} x {name}: {cpus:g} CPU, {gpus:g} GPU, torch threads: {resources.threads} each")
        else:
            lines.append(f"{name} in this process, torch threads: {resources.threads}")
    return lines


def memory_estimate(config: RunConfig, parameters: tuple[int, int]) -> float:
    """Bytes at the peak of a step, roughly: weights, gradients, optimiser, cache, activations of a micro-batch.

    fp32 weights (4 bytes) in each replica, with bf16 copies while it acts; gradients (4) and AdamW's moments (8) of
    what trains; activations by the usual count of about 34 bytes x hidden x layers a token (arXiv 2205.05198).
    """
    total, trainable = parameters
    resources, rollout = config.resources, config.rollout
    separate = resources.num_rollout_workers + max(resources.num_learners, resources.num_rollout_workers > 0)
    replicas = max(separate, 1)
    algorithm = config.algorithm
    learners = max(resources.num_learners, 1)
    copied = algorithm.kl.coef > 0 and (config.policy.trainable != "lora" or algorithm.reference.refresh_every)
    reference = trainable * 4 * learners if copied else 0
    optimizer = 8 if config.learner.optimizer == "adamw" else 4 * (config.learner.momentum > 0)
    settings = architecture(config.policy).get_text_config()
    width, depth = settings.hidden_size, settings.num_hidden_layers
    tokens = min(
        config.learner.tokens_per_microbatch,
        rollout.prompts_per_step
        * (config.task.max_prompt_tokens + rollout.samples_per_prompt * rollout.max_new_tokens),
    )
    activations = tokens * width * (2 * depth + 34 if config.policy.gradient_checkpointing else 34 * depth)
    # In an evaluation every row has a prompt of its own.
    cache = rollout.request_rows * (config.task.max_prompt_tokens + rollout.max_new_tokens) * depth * width * 4
    base = 0.4 * GIB * (1 + resources.num_rollout_workers + resources.num_learners + resources.num_reward_workers)
    # A value model of its own is a second policy that learns.
    learning = 2 if build_algorithm(algorithm).advantage == "gae" and algorithm.value.model == "own" else 1
    learner = trainable * (4 + optimizer) + activations
    return (replicas + (learning - 1) * learners) * total * 6 + reference + learners * learning * learner + cache + base
