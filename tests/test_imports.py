"""Modules of the user's: beside the config, in the current folder, and in the processes of workers."""

import functools
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pyarrow as pa
import pytest

from rl_llm import imports
from rl_llm.config import ComponentConfig, read_config
from rl_llm.errors import UserError
from rl_llm.imports import import_function
from rl_llm.rewards import Component, RewardWorker
from rl_llm.runtime.pool import Pool

MODULES = ("beside_of_a_test", "here_of_a_test")
ROWS = pa.table({"prompt": ["p"], "completion": ["c"], "completion_ids": [[1]]})


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a config and a module beside it; the current one has a module too, and another of that name."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(imports, "_beside", [])
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/beside_of_a_test.py").write_text("def f(completions):\n    return [0.5] * len(completions)\n")
    (tmp_path / "conf/run.yaml").write_text("rewards: {components: [beside_of_a_test:f]}\n")
    (tmp_path / "here").mkdir()
    (tmp_path / "here/here_of_a_test.py").write_text("def f(completions):\n    return [0.25] * len(completions)\n")
    (tmp_path / "here/beside_of_a_test.py").write_text("raise RuntimeError\n")
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "conf"
    for name in MODULES:
        sys.modules.pop(name, None)


def value(use: str) -> float | None:
    return Component("mine", ComponentConfig(use=use)).score(ROWS).values[0]


def test_a_module_beside_the_config_is_found_and_one_in_the_current_folder(conf: Path) -> None:
    read_config(conf / "run.yaml")
    assert (value("beside_of_a_test:f"), value("here_of_a_test:f")) == (0.5, 0.25)
    message = rf"No module named 'nowhere_of_a_test' in {conf} or {conf.parent / 'here'}, nor where Python looks"
    with pytest.raises(UserError, match=message):
        import_function("nowhere_of_a_test:f", "reward")


def test_a_run_s_own_config_knows_where_its_modules_lay(conf: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"rewards: {{components: [beside_of_a_test:f]}}\nimports: [{conf}]\n")
    assert read_config(tmp_path / "config.yaml").keys() == {"rewards"}
    assert value("beside_of_a_test:f") == 0.5


def test_workers_find_the_module_beside_the_config_too(conf: Path, ray_session: None) -> None:
    from rl_llm.runtime.actor import Actor

    read_config(conf / "run.yaml")
    configs = {name: ComponentConfig(use=f"{name}:f") for name in MODULES}
    make = functools.partial(RewardWorker, configs, {})
    with closing(Pool("reward", make, lambda index: Actor(1, {"num_cpus": 0.5}), 1)) as pool:
        assert [pool.call("score", name, ROWS).values for name in MODULES] == [[0.5], [0.25]]
