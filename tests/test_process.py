"""What code of the user's makes of the process is its own affair: its folder, and how torch computes."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import tiny
import tiny_rewards
import torch
from conftest import Tiny

import rl_llm
from rl_llm.config import ComponentConfig, PolicyConfig
from rl_llm.errors import UserError
from rl_llm.imports import import_function
from rl_llm.launch.warm_start import cache_folder
from rl_llm.policies import CausalLM
from rl_llm.process import absolute, own_modes
from rl_llm.rewards import Component
from rl_llm.runs.run import Run


@pytest.fixture(autouse=True)
def as_before() -> Any:
    """A test that fails leaves the next ones a process as they know it."""
    here, threads = os.getcwd(), torch.get_num_threads()
    yield
    os.chdir(here)
    torch.set_num_threads(threads)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def modes() -> tuple[Any, ...]:
    floats = torch.empty(0)
    return os.getcwd(), torch.is_grad_enabled(), floats.dtype, torch.get_num_threads(), floats.device


class Rude:
    """Changes everything when it is set up, and scores 1 as long as it finds it as it left it."""

    def __init__(self, *, folder: str) -> None:
        self.folder = folder

    def setup(self) -> None:
        os.chdir(self.folder)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        torch.set_default_device("meta")
        torch.set_num_threads(3)
        self.mine = modes()

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return [float(modes() == self.mine)] * len(completions)


def rows(count: int) -> pa.Table:
    return pa.table({"prompt": ["p"] * count, "completion": ["c"] * count, "completion_ids": [[1]] * count})


def test_a_component_keeps_what_it_changes_and_the_process_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = modes()
    component = Component("rude", ComponentConfig(use="test_process:Rude", args={"folder": str(tmp_path)}))
    for _ in range(2):
        assert component.score(rows(2)).values == [1.0, 1.0]
        assert modes() == before
    [message] = caplog.messages
    assert message.startswith(f"component 'rude' changed the working folder (to {tmp_path}), torch's gradients (to ")


def test_a_component_that_fails_leaves_the_process_alone(tmp_path: Path) -> None:
    def lost(completions: list[str], **columns: Any) -> list[float]:
        os.chdir(tmp_path)
        raise ValueError("lost")

    before = modes()
    assert Component("lost", ComponentConfig(use="x"), lost).score(rows(1)).status == ["error"]
    assert modes() == before


def test_an_import_leaves_the_process_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "greedy_of_a_test.py").write_text(
        "import torch\ntorch.set_default_dtype(torch.float16)\ndef f(completions): return [1.0]\n"
    )
    monkeypatch.chdir(tmp_path)
    import_function("greedy_of_a_test:f", "reward")
    assert torch.get_default_dtype() == torch.float32
    assert "reward 'greedy_of_a_test:f', when imported, changed torch's default dtype (to torch.float16)" in caplog.text


def test_a_run_keeps_its_way_under_a_rude_reward_and_a_rude_caller(
    tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numbers are those of the run left alone, it ends, and the caller has the process as it was."""

    def match(completions: list[str], colour: list[str], **columns: Any) -> list[float]:
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        os.chdir(tmp_path / "elsewhere")
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float16)
        return tiny_rewards.match(completions, colour, **columns)

    monkeypatch.chdir(tmp_path)
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(3)
    before = modes()
    config = tiny_run.config()
    config.rewards.components["match"].use = "function:match"
    tiny.train(config, Path("run"), functions={"match": match})
    assert modes() == before
    run = Run("run")
    assert run.status == "finished"
    assert [p.name for p in tmp_path.iterdir() if p.name != "elsewhere"] == ["run"]
    assert tiny.metrics(run.path) == tiny.metrics(tiny_run.undisturbed)


def test_gradients_are_there_whoever_turned_them_off(tiny_run: Tiny) -> None:
    policy = CausalLM(tiny_run.policy, PolicyConfig(precision="fp32"))
    with torch.no_grad(), policy.training(dropout=0.0):
        assert torch.is_grad_enabled()


def test_own_modes_are_the_defaults_and_the_callers_come_back() -> None:
    torch.set_default_device("meta")
    torch.set_grad_enabled(False)
    before = modes()
    with own_modes():
        assert modes()[1:3] == (True, torch.float32)
        assert torch.empty(0).device.type == "cpu"
        torch.set_num_threads(2)
    assert modes() == before


def test_paths_lead_to_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "me"))
    for given, meant in (("cache", "cache"), ("~/cache", "me/cache"), (str(tmp_path / "x"), "x")):
        monkeypatch.setenv("RL_LLM_CACHE", given)
        assert cache_folder() == tmp_path / meant / "warm_start"
    monkeypatch.setenv("RL_LLM_CACHE", "")
    assert cache_folder() == tmp_path / "me/.cache/rl_llm/warm_start"
    with pytest.raises(UserError, match="~nobody-of-a-test/x: nobody's home folder is known"):
        absolute("~nobody-of-a-test/x")


def test_output_may_begin_with_the_home_folder(tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    run = rl_llm.train(
        tiny_run.policy, tiny_run.data, "tiny_rewards:match", output="~/run", steps=1, task={"prompt": "{text}"},
        rollout={"prompts_per_step": 2, "samples_per_prompt": 2, "max_new_tokens": 2}, logging={"tensorboard": False},
        evaluation={"prompts": 2, "test_prompts": 2},
    )  # fmt: skip
    assert run.path == tmp_path / "run"
