"""Weights on their way: names as in the saved folder, numbers that never come again, tensors as they were."""

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import Tiny
from safetensors.torch import load_file

from rl_llm.config import LoraConfig, PolicyConfig
from rl_llm.policies import CausalLM
from rl_llm.rollout import LocalEngine
from rl_llm.runtime.weights import InPlace, Manifest, ObjectStore, flatten, unflatten


class Publisher:
    """Stands in for the learners: publishes what a policy has."""

    kind: Any = "full"

    def __init__(self, policy: CausalLM) -> None:
        self.policy = policy

    def weights(self) -> tuple[Manifest, Any]:
        return flatten(self.policy.named_weights().items())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_names_are_those_of_the_saved_model(tiny_run: Tiny, tmp_path: Path, kind: str) -> None:
    folder = tiny.build_architecture(kind, tmp_path / "made", tiny_run.policy)
    policy = CausalLM(folder, PolicyConfig(precision="fp32"))
    policy.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    manifest, _ = flatten(policy.named_weights().items())
    assert {name: (dtype, shape) for name, dtype, shape in manifest} == {
        name: ("float32", tuple(tensor.shape)) for name, tensor in saved.items()
    }


def test_names_of_an_adapter_are_those_that_peft_saves(tiny_run: Tiny, tmp_path: Path) -> None:
    policy = CausalLM(tiny_run.policy, PolicyConfig(precision="fp32", trainable="lora", lora=LoraConfig(r=4)))
    model: Any = policy.model
    model.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name: list(w.shape) for name, w in policy.named_weights().items()} == {
        name: list(w.shape) for name, w in saved.items()
    }


def test_every_kind_of_tensor_comes_back_as_it_was() -> None:
    named = {
        "matrix": torch.randn(3, 5),
        "half": torch.randn(7).bfloat16(),
        "turned": torch.randn(4, 2).t(),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "counts": torch.arange(3),
    }
    manifest, data = flatten(named.items())
    again = dict(unflatten(manifest, data))
    assert list(again) == list(named)
    for name, tensor in named.items():
        assert again[name].dtype == tensor.dtype
        assert torch.equal(again[name], tensor)
    with pytest.raises(ValueError, match="more than"):
        list(unflatten(manifest[:-1], data))
    assert list(unflatten(*flatten([]))) == []


def test_reader_takes_in_each_publish_once(tiny_run: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    learner, replica = (CausalLM(tiny_run.policy, PolicyConfig(precision="fp32")) for _ in range(2))
    channel, loads = ObjectStore(shared=False), []
    engine = LocalEngine(replica, channel)
    load = replica.load_named
    monkeypatch.setattr(replica, "load_named", lambda tensors: loads.append(1) or load(tensors))
    for factor in (1.5, 2.0):
        with torch.no_grad():
            for p in learner.trainable.values():
                p.mul_(factor)
        weights = channel.publish(Publisher(learner), step=7)  # the same step again, as after a restore
        assert engine.loaded != weights.number
        for _ in range(2):
            engine.load(weights)
        assert torch.equal(tiny.flat(replica), tiny.flat(learner))
    assert len(loads) == 2


def test_numbers_never_come_again() -> None:
    channel = InPlace()
    numbers = [channel.publish(None, step).number for step in (0, 1, 0, 0)]
    assert len(set(numbers)) == 4
