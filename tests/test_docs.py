"""The documentation keeps up with the code: every key with its default, every example valid, every link alive."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from conftest import Tiny
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import rl_llm
from rl_llm.config import BoundConfig, ComponentConfig, ControllerConfig, GateConfig, RunConfig, build_config
from rl_llm.config.yaml12 import read_yaml
from rl_llm.rewards import known
from rl_llm.search.config import SearchConfig, build_search
from rl_llm.search.plan import make_space

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
MODELS = [RunConfig, ComponentConfig, GateConfig, ControllerConfig, BoundConfig]
ROW = re.compile(r"^\| `([\w.]+)` \| (.+?) \| (.+?) \| (.*?) ?\|$", re.MULTILINE)


def documented(page: str = "configuration.md") -> dict[str, str]:
    """Each key in the tables of a page and what stands as its default."""
    rows = ROW.findall((ROOT / "docs" / page).read_text())
    return {key: default for key, _, default, _ in rows}


def defaults(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each key of a section and of those in it, with its default."""
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from defaults(field.annotation, f"{key}.")
        else:
            default = field.default
            yield key, list(default) if isinstance(default, tuple) else default


@pytest.mark.parametrize("model", MODELS)
def test_every_key_is_documented_with_its_default(model: type[BaseModel]) -> None:
    found = documented()
    for key, default in defaults(model):
        assert key in found, f"docs/configuration.md lacks {key}"
        if key == "use":
            assert found[key] == "the name"
        elif default is PydanticUndefined:
            assert found[key] == "required"
        else:
            assert read_yaml(found[key].strip("`")) == default, f"docs/configuration.md has another default for {key}"


def test_no_key_is_documented_that_does_not_exist() -> None:
    keys = {key for model in MODELS for key, _ in defaults(model)}
    assert set(documented()) - keys == set()


def test_every_key_of_a_search_is_documented_with_its_default() -> None:
    found = documented("search.md")
    expected = dict(defaults(SearchConfig))
    assert found.pop("space") == "required"
    assert expected.pop("space") is PydanticUndefined
    assert {key: read_yaml(default) for key, default in found.items()} == expected


def blocks(language: str) -> list[Any]:
    found = []
    for page in PAGES:
        for number, text in enumerate(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.S | re.M)):
            found.append(pytest.param(text, id=f"{page.name}-{number}"))
    return found


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_examples_are_configs(text: str) -> None:
    raw = yaml.safe_load(text)
    if "space" in raw:
        assert make_space(build_search(raw)).corners()
        return
    assert set(raw) <= set(RunConfig.model_fields)
    # An excerpt shows some sections; what a run cannot do without is put beside it.
    raw.setdefault("rewards", {}).setdefault("components", ["chrf"])
    raw.setdefault("policy", {"model": "owner/model"})
    config = build_config(raw)
    for component in [*config.rewards.components.values(), *config.evaluation.metrics.values()]:
        assert ":" in component.use or component.use in known()


@pytest.mark.parametrize("text", blocks("python"))
def test_python_examples_compile(text: str) -> None:
    ast.parse(text)


def callbacks() -> list[Any]:
    """Every example of a callback; what stands in a docstring is one too."""
    example = textwrap.dedent((inspect.getdoc(rl_llm.Callback) or "").partition("Example:\n")[2])
    pages = [block for block in blocks("python") if "rl_llm.Callback" in block.values[0]]
    return [*pages, pytest.param("import rl_llm\n" + example, id="Callback")]


@pytest.mark.parametrize("text", callbacks())
def test_callbacks_of_examples_follow_a_run_in_which_a_reward_never_applies(
    tiny_run: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(rl_llm, "train", lambda *args, **settings: None)
    names: dict[str, Any] = {}
    exec(text, names)
    kinds = [kind for kind in names.values() if isinstance(kind, type) and issubclass(kind, rl_llm.Callback)]
    assert kinds
    functions = {"length": lambda completions, **columns: [None] * len(completions)}
    components = {"match": "tiny_rewards:match", "length": "function:length"}
    config = tiny_run.config(rewards={"components": components}, trainer={"steps": 1})
    run = tiny.train(config, tmp_path / "run", *(kind() for kind in kinds), functions=functions)
    assert run.status == "finished"
    assert "reward/length/mean" not in run.metrics


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
