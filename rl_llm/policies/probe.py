"""The probe: whether a policy says of a model what the model says of itself. Asked before anything is trained.

No list of architectures could say so. What differs between them is small, such as a factor before the softmax, and what
comes of it is not an error but another policy, which would be trained without a word.
"""

import copy
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from rl_llm.config import PolicyConfig
from rl_llm.errors import UserError
from rl_llm.policies.causal_lm import CausalLM
from rl_llm.policies.loading import first_line, read_architecture
from rl_llm.policies.packing import PackedRow
from rl_llm.policies.sampling import SamplingParams

LIMIT = 0.05
"""Nats that a log-prob may be off in fp32, where rounding alone makes some 1e-5."""

# A model with more parameters is probed by its first layers: at least so many.
_WHOLE, _LAYERS = 300e6, 2

_LENGTHS, _SAMPLES, _TOKENS = (1, 4, 9), 2, 3
_PARAMS = SamplingParams(_SAMPLES, 1.0, 1.0, 0, _TOKENS, _TOKENS, (), seed=0)


@dataclass(frozen=True)
class Probe:
    """How far log-probs of the same tokens are apart, at the most.

    Attributes:
        engine: nats between those that `sample` returns and those of the library's own forward.
        learner: nats between those of `forward` on packed groups and the same.
        layers, depth: how many of the model's layers were there, and how many it has.
    """

    engine: float
    learner: float
    layers: int
    depth: int

    def __str__(self) -> str:
        layers = "" if self.layers == self.depth else f" ({self.layers} of {self.depth} layers)"
        return f"engine {self.engine:.0e} and learner {self.learner:.0e} nats off the model's own forward{layers}"


def probe(kind: type[CausalLM], model: str, config: PolicyConfig, parameters: int, longest: int = 0) -> Probe:
    """Load a model as a run would, in fp32 on the CPU, have it act on made-up prompts, and compare.

    The truth is the library's own forward with the attention it loads the model with, a sample at a time and so without
    padding: what a model makes of padding is its own affair, as no policy here relies on it. The policy is asked with
    all prompts together, which pads them, and with one alone.

    A model of more than 300 million parameters is loaded with its first layers only, real weights, at least two and as
    many as show every kind that its settings list (`layer_types` and the like).

    Args:
        parameters: how many the whole model has.
        longest: tokens that a prompt with its completion may come to.

    Raises:
        UserError: log-probs are more than `LIMIT` apart, `longest` is too long, or the model cannot be used at all.
    """
    settings = read_architecture(model)
    name, seen = settings.model_type, "docs/models.md says which models can"
    threads = torch.get_num_threads()
    if parameters <= _WHOLE:
        torch.set_num_threads(1)  # a few tokens of a small model keep more of them waiting for each other
    try:
        # Which weights train changes no log-prob, and the last layers may not be there.
        trainable = "lora" if config.trainable == "lora" else "all"
        config = config.model_copy(update={"precision": "fp32", "trainable": trainable})
        short = first_layers(settings) if parameters > _WHOLE else None
        policy = kind(model, config, short, torch.device("cpu"))
        policy.check_length(longest)
        engine, learner = _compare(policy)
    except UserError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {first_line(error)}" if str(error) else type(error).__name__
        raise UserError(f"policy.model: {name} cannot be used ({what}); {seen}") from error
    finally:
        torch.set_num_threads(threads)
    if not max(engine, learner) <= LIMIT:
        raise UserError(
            f"policy.model: {name} cannot be used: what it samples with and what it learns from are {engine:.2g} and "
            f"{learner:.2g} nats off its own forward; {seen}"
        )
    layers, depth = (found.get_text_config().num_hidden_layers for found in (short or settings, settings))
    return Probe(engine, learner, layers, depth)


def first_layers(settings: PreTrainedConfig) -> PreTrainedConfig:
    """The settings of a model with the first layers only, in which every kind of layer is seen."""
    short = copy.deepcopy(settings)
    text = short.get_text_config()
    depth = text.num_hidden_layers
    each = {name: value for name, value in vars(text).items() if isinstance(value, list) and len(value) == depth}
    layers = max([min(_LAYERS, depth), *(1 + max(map(value.index, value)) for value in each.values())])
    for name, value in each.items():
        setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return short


def _compare(policy: CausalLM) -> tuple[float, float]:
    """The largest differences of engine and learner from the plain forward, in nats; NaN where one is none."""
    prompts = _prompts(policy)
    off = np.zeros(2)
    for together in (prompts, prompts[-1:]):
        acted = policy.sample(together, np.arange(len(together) * _SAMPLES), _PARAMS)
        completions = np.stack(acted.ids).reshape(len(together), _SAMPLES, -1)
        samples = np.arange(len(acted.ids)).reshape(len(together), _SAMPLES)
        packed = zip(samples.tolist(), together, completions, strict=True)
        batch = policy.pack([PackedRow(tuple(rows), prompt, tuple(own)) for rows, prompt, own in packed])
        with torch.no_grad():
            learner = policy.forward(batch, 1.0).logprobs[batch.rows.argsort()].numpy()
        with policy.plain() as model:
            truth = np.concatenate([_plain(model, *row) for row in zip(together, completions, strict=True)])
        off = np.maximum(off, [np.abs(found - truth).max() for found in (np.stack(acted.logprobs), learner)])
    return float(off[0]), float(off[1])


def _prompts(policy: CausalLM) -> list[np.ndarray]:
    """Made-up prompts of different lengths, without special tokens, which may stand for an image or for padding."""
    rows = policy.unwrapped.get_input_embeddings().weight.shape[0]
    usable = np.setdiff1d(np.arange(min(rows, len(policy.tokenizer))), policy.tokenizer.all_special_ids)
    generator = np.random.default_rng(0)
    return [generator.choice(usable, length) for length in _LENGTHS]


def _plain(model: PreTrainedModel, prompt: np.ndarray, completions: np.ndarray) -> np.ndarray:
    """Log-probs [n, T] of completions [n, T] from one forward without padding."""
    ids = torch.from_numpy(np.concatenate([np.tile(prompt, (len(completions), 1)), completions], axis=1)).long()
    with torch.no_grad():
        logp = model(input_ids=ids).logits[:, len(prompt) - 1 : -1].double().log_softmax(dim=-1)
    found: np.ndarray = logp.gather(2, ids[:, len(prompt) :, None]).squeeze(2).numpy()
    return found
