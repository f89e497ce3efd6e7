"""The base: the folder a run's reinforcement learning starts from, built and warm-started once and cached."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import tokenizers
import torch
import transformers

from rl_llm.config import RunConfig
from rl_llm.errors import UserError
from rl_llm.files import room_for
from rl_llm.learner.supervised import encode_examples, train_supervised
from rl_llm.policies import load_policy
from rl_llm.policies.loading import adapter_base
from rl_llm.policies.scratch import build_scratch
from rl_llm.process import absolute
from rl_llm.runtime.pool import Pool
from rl_llm.runtime.shared import marked, refuse_unshared
from rl_llm.tasks import Task

# Texts the byte-pair merges are learned from; more would not change a small vocabulary.
TOKENIZER_TEXTS = 20_000


def cache_folder() -> Path:
    """Where warm-started models are kept between runs: RL_LLM_CACHE, else the user's cache folder.

    Raises `UserError` where there is neither.
    """
    given = os.environ.get("RL_LLM_CACHE")
    if given is None and os.path.expanduser("~") == "~":
        raise UserError("there is no home folder to keep warm-started models in; set RL_LLM_CACHE to a folder")
    return absolute(given or "~/.cache/rl_llm") / "warm_start"


def needs_base(config: RunConfig) -> bool:
    """Whether a base has to be built, rather than a given model used as it is."""
    warm = config.warm_start
    return config.policy.model is None or warm.pretrain_steps + warm.supervised_steps > 0


def base_path(config: RunConfig, task: Task) -> Path:
    """Where the base of these settings, this text, this given model and these libraries is, or will be, cached."""
    texts = task.training_texts(config.warm_start.target)
    settings = {
        "policy": config.policy.model_dump(include={"type", "model", "scratch", "dropout", "precision"}),
        "files": _fingerprint(config.policy.model),
        "warm_start": config.warm_start.model_dump(),
        "task": config.task.model_dump(include={"chat", "system", "chat_args", "max_prompt_tokens"}),
        "seed": config.trainer.seed,
        "threads": config.resources.threads,
        "versions": [torch.__version__, transformers.__version__, tokenizers.__version__],
    }
    digest = hashlib.sha256(json.dumps([settings, texts], sort_keys=True).encode()).hexdigest()
    return cache_folder() / digest[:20]


def _fingerprint(model: str | None) -> list[tuple[str, int, int]]:
    """Name, size in bytes and time of change in ns of each file of a model's folder; nothing for a Hub name.

    Those of the model that an adapter was made for are among them.
    """
    if model is None or not Path(model).is_dir():
        return []
    files = sorted(path for path in Path(model).iterdir() if path.is_file())
    own = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return own + _fingerprint(adapter_base(model))


def build_base(config: RunConfig, task: Task, folder: Path, progress: Callable[[str], None]) -> None:
    """Build, warm-start and save the policy to `folder`, which appears whole or not at all."""
    torch.set_num_threads(config.resources.threads)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with room_for(folder), tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        source = config.policy.model
        if source is None:
            source = str(Path(scratch) / "cold")
            texts = task.training_texts(config.warm_start.target)[:TOKENIZER_TEXTS]
            build_scratch(
                config.policy.scratch, (t for prompt, ts in texts for t in (prompt, *ts)), source, config.trainer.seed
            )
        policy = load_policy(source, config.policy.model_copy(update={"trainable": "all"}))
        task.tokenize(policy.tokenizer, policy.continues)
        warm = config.warm_start
        examples = encode_examples(policy, *task.targets(warm.target), warm.max_target_tokens)
        for steps, whole in ((warm.pretrain_steps, True), (warm.supervised_steps, False)):
            name = "self-supervised" if whole else "supervised"

            def report(step: int, total: int, loss: float, name: str = name) -> None:
                if step % 50 == 0 or step == total:
                    progress(f"warm start, {name}: step {step}/{total}  loss {loss:.3f}")

            if steps:
                train_supervised(
                    policy, examples, warm, config.trainer.seed, steps=steps, whole_text=whole, progress=report
                )
        ready = Path(scratch) / "ready"
        policy.save_pretrained(ready, torch.float32)  # reinforcement learning goes on from the very weights
        # Another run may have finished the same base meanwhile; both are the same.
        if folder.exists():
            return
        shutil.move(ready, folder)


class BaseBuilder:
    """The worker that builds a base where the learner will be."""

    def build(self, config: RunConfig, task: Task, folder: Path, mark: Path) -> None:
        """Raises `UserError` where the cache folder, which has this file of the driver's, is not to be seen here."""
        refuse_unshared(mark, "set RL_LLM_CACHE to a folder")
        build_base(config, task, folder, print)


def ensure_base(config: RunConfig, task: Task, note: Callable[[str], None]) -> str:
    """The folder (or Hub name) of the policy before reinforcement learning, warm-started if that is not cached."""
    if not needs_base(config):
        assert config.policy.model is not None
        return config.policy.model
    folder, resources = base_path(config, task), config.resources
    if folder.is_dir():
        note(f"warm start: found in the cache, {folder}")
    elif resources.num_learners == 0:
        build_base(config, task, folder, note)
    else:
        from rl_llm.runtime.actor import Actor
        from rl_llm.runtime.cluster import Placement

        note("warm start: under way with the learner's resources")
        alone = {"num_learners": 1, "num_rollout_workers": 0, "num_reward_workers": 0}
        room = Placement(resources.model_copy(update=alone))
        try:
            place = partial(Actor, resources.threads, room.bundle("learner", 0))
            builder = Pool("warm start", BaseBuilder, lambda index: place(), 1, max_attempts=1)
            with closing(builder), marked(folder.parent) as mark:
                builder.call("build", config, task, folder, mark)
        finally:
            room.remove()
    return str(folder)
