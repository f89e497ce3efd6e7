"""Files, recipes and overrides become a config; whatever is wrong is said in a line that names the key."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rl_llm.config import Ramp, RunConfig, build_config, load_config, read_config, recipes, value_at
from rl_llm.config.yaml12 import read_yaml
from rl_llm.errors import UserError


def plain(**sections: Any) -> dict[str, Any]:
    return {"policy": {"model": "owner/model"}, "rewards": {"components": ["chrf", "length"]}, **sections}


def built(*overrides: str, **sections: Any) -> RunConfig:
    return build_config(plain(**sections), overrides, where="run.yaml")


def complaint(*overrides: str, **sections: Any) -> list[str]:
    with pytest.raises(UserError) as caught:
        built(*overrides, **sections)
    return str(caught.value).split("\n")


# What the overrides below go wrong in is the whole of what a user reads.
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("learnr.lr=1", "unknown key 'learnr'; did you mean 'learner'?"),
        ("learner.lrr=1", "unknown key 'learner.lrr'; did you mean 'lr'?"),
        ("task.split.tset=0.1", "unknown key 'task.split.tset'; did you mean 'test'?"),
        ("rewards.components.chrf.time_s=1", "unknown key 'rewards.components.chrf.time_s'; did you mean 'timeout_s'?"),
        ("rewards.weights.chr=1", "weights.chr: no such component; did you mean 'chrf'?"),
        ("learner.lr=fast", "learner.lr: Input should be a valid number"),
        ("learner.lr=.inf", "learner.lr: Input should be a finite number"),
        ("trainer.steps=true", "trainer.steps: a number is needed, not true or false (given: True)"),
        ("learner.lr=-1", "learner.lr: Input should be greater than 0 (given: -1)"),
        ("trainer.steps=1.5", "trainer.steps: Input should be a valid integer"),
        ("trainer=5", "trainer: a section is needed here, with keys such as steps, seed (given: 5)"),
        ("algorithm.name=grppo", "algorithm.name: Input should be 'grpo', 'dr_grpo', 'rloo', 'dapo'"),
        ("rewards.weights.chrf=high", "rewards.weights.chrf: Input should be a valid number"),
        ("rewards.weights.chrf=[1, 2]", "rewards.weights.chrf: Input should be a valid number"),
        ("rewards.weights.chrf={start: 1, end: 0}", "rewards.weights.chrf.steps is missing"),
        ("rewards.components=[chrf, mine:chrf]", "two components are called 'chrf'; write them as name: id"),
        ("rewards.components=[{chrf: 1}]", "a list holds ids only, not {'chrf': 1}"),
        ("rewards.components={}", "at least one component is needed"),
        ("rewards.components.chrf.clip=[1, 0]", "clip must be [low, high] with low < high"),
        ("rewards.components.chrf.on_failure=impute", "on_failure: impute and a value `impute: <number>` go together"),
        ("rewards.components.chrf.gate={component: lenth, above: 1, else: 0}", "did you mean 'length'?"),
        ("rewards.components.chrf.gate={component: length, else: 0}", "a gate needs 'above' or 'below'"),
        ("rollout.stop.0=x", "rollout.stop: Input should be a valid list"),
        ("rollout.temperature=0", "temperature must stay above 0"),
        ("rollout.min_new_tokens=100", "min_new_tokens 100 exceeds max_new_tokens 64"),
        ("rollout.rows_per_request=30", "rows_per_request 30 must be a multiple of samples_per_prompt 8"),
        ("policy.scratch.heads=3", "hidden_size 128 must be a multiple of 2 x heads (6)"),
        ("rollout.stop=['\\n', '']", "stop: an empty string would end every completion"),
        ("evaluation.utility={}", "it names no metric; leave it out, or null, for the default"),
        ("policy.lora.targets=[]", "it names no module; leave it out for all linear layers"),
        ("learner.betas=[0.9, 1]", "learner.betas.1: Input should be less than 1"),
        ("rewards.weights={chrf: 1, chrf: 2}", "not valid YAML: line 1: the key 'chrf' stands there twice"),
        ("task.split={tune: 0.6, test: 0.5}", "tune + test leave no rows to train on"),
    ],
)  # fmt: skip
def test_an_override_that_cannot_be_is_named_with_its_reason(override: str, expected: str) -> None:
    [line] = complaint(override)
    assert line.startswith(f"override {override!r}: ")
    assert expected in line


@pytest.mark.parametrize("override", ["steps", "=1", "trainer..steps=1", ".steps=1"])
def test_an_override_is_section_key_value(override: str) -> None:
    assert complaint(override) == [f"override {override!r}: write it as section.key=value"]


def test_an_override_does_not_lead_through_a_list() -> None:
    [line] = complaint("rollout.stop.first=x", rollout={"stop": ["a"]})
    assert line == "override 'rollout.stop.first=x': rollout.stop is ['a'], not a section"


def test_an_override_that_is_no_yaml() -> None:
    [line] = complaint("rollout.stop=[a")
    assert line.startswith("override 'rollout.stop=[a': '[a' is not valid YAML: line 1: ")


def test_mistakes_in_the_file_are_told_from_those_in_overrides() -> None:
    wrong = {"trainer": {"stepps": 1}}
    assert complaint("learner.lr=x", **wrong) == [
        "override 'learner.lr=x': learner.lr: Input should be a valid number, unable to parse string as a number "
        "(given: 'x')",
        "run.yaml: unknown key 'trainer.stepps'; did you mean 'steps'?",
    ]


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"rewards": {}}, "rewards.components is missing"),
        ({"rewards": {"components": "chrf"}}, "rewards.components: Input should be a valid dictionary"),
        ({"policy": {}}, "set policy.model, or warm_start.supervised_steps above 0"),
        ({"evaluation": {"metrics": ["chrf"]}}, "['chrf'] are reward components already"),
        ({"evaluation": {"utility": {"chr": 1}}}, "evaluation.utility.chr: no such metric; did you mean 'chrf'?"),
    ],
)
def test_sections_that_do_not_go_together(sections: dict[str, Any], expected: str) -> None:
    [line] = complaint(**sections)
    assert line.startswith("run.yaml: ")
    assert expected in line


def test_numbers_lists_and_ramps_as_overrides() -> None:
    config = built(
        "learner.lr=1e-5",
        "learner.betas=[0.8, 0.95]",
        "rollout.stop=['.', \"\\n\"]",
        "rewards.weights.length={start: 0.5, end: 0, steps: 10}",
        "rollout.temperature.start=1.2",
        "rollout.temperature.end=0.7",
        "rollout.temperature.steps=20",
        "algorithm.kl.coef=0.1",
    )
    assert config.learner.lr == 1e-5
    assert config.learner.betas == (0.8, 0.95)
    assert config.rollout.stop == [".", "\n"]
    assert config.rewards.weights == {"chrf": 1.0, "length": Ramp(start=0.5, end=0, steps=10)}
    assert [value_at(config.rollout.temperature, step) for step in (0, 10, 20, 99)] == [1.2, 0.95, 0.7, 0.7]
    assert config.algorithm.kl.coef == 0.1


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.e-5", ".1e-4", "+10e-6", "0.00001"])
def test_a_number_with_an_exponent_is_one_for_a_reward_s_arguments_too(text: str) -> None:
    config = built("rewards.components.mine.use=a:b", f"rewards.components.mine.args.eps={text}")
    assert config.rewards.components["mine"].args == {"eps": pytest.approx(1e-5)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0100", 100), ("-007", -7), ("0o17", 15), ("0x1F", 31), ("1_000", "1_000"), ("12:30", "12:30"), ("0b1", "0b1"),
        ("1.", 1.0), (".5", 0.5), ("-.inf", float("-inf")), ("1:30.5", "1:30.5"), ("2024-01-01", "2024-01-01"),
        ("on", "on"), ("Yes", "Yes"), ("n", "n"), ("off", "off"), ("true", True), ("FALSE", False), ("~", None),
        ("", None), ("NULL", None), ("=", "="), ("{<<: {a: 1}, b: no}", {"a": 1, "b": "no"}),
    ],
)  # fmt: skip
def test_yaml_is_that_of_version_1_2(text: str, expected: Any) -> None:
    config = built("rewards.components.mine.use=a:b", f"rewards.components.mine.args.x={text}")
    found = config.rewards.components["mine"].args["x"]
    assert (found, type(found)) == (expected, type(expected))


def test_names_and_numbers_in_a_file_are_what_they_look_like(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "policy: {model: a/b}\nrewards:\n  components: {on: chrf, no: length}\n  weights: {on: 010}\n"
        "trainer: {steps: 0100}\ntask: {system: 12:30}\nlogging: {tensorboard: off}\n"
    )
    config = load_config(path, ["rewards.weights.no=2"])
    assert config.rewards.weights == {"on": 10.0, "no": 2.0}
    assert (config.trainer.steps, config.task.system, config.logging.tensorboard) == (100, "12:30", False)


@pytest.mark.parametrize("text", ["on", "0o17", "1e5", "012", "12:30", "1_0", "null", "2024-01-01", "true", "<<", ""])
def test_a_text_that_looks_like_something_else_survives_every_reader(text: str) -> None:
    written = build_config(plain(task={"system": text, "chat": True})).to_yaml()
    assert read_yaml(written)["task"]["system"] == text
    assert yaml.safe_load(written)["task"]["system"] == text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("task.prompt={article}", "{article}"),
        ("task.prompt=Summarise: {article}", "Summarise: {article}"),
        ("task.prompt=Q: {a}: {b}", "Q: {a}: {b}"),
        ('task.prompt="{article}\\n\\nSummary:"', "{article}\n\nSummary:"),
        ("task.prompt=2024", "2024"),
    ],
)
def test_a_text_may_look_like_yaml(override: str, expected: str) -> None:
    assert built(override).task.prompt == expected


def test_an_optional_text_can_be_taken_away() -> None:
    assert built("task.system=null", task={"system": "be brief", "chat": True}).task.system is None


@pytest.mark.parametrize(
    "components", [["chrf", "length"], {"chrf": "chrf", "length": None}, {"chrf": {}, "length": {}}]
)
def test_overrides_reach_into_components_however_they_are_written(components: Any) -> None:
    config = built(
        "rewards.components.length.args.target=7", "rewards.components.new=rouge", "rewards.components.new.args.kind=1",
        rewards={"components": components},
    )  # fmt: skip
    found = {name: (component.use, component.args) for name, component in config.rewards.components.items()}
    assert found == {"chrf": ("chrf", {}), "length": ("length", {"target": 7}), "new": ("rouge", {"kind": 1})}


def test_overrides_reach_into_metrics_written_as_a_list() -> None:
    config = built("evaluation.metrics.bleu.args.lowercase=true", evaluation={"metrics": ["bleu"]})
    assert config.evaluation.metrics["bleu"].args == {"lowercase": True}


def test_every_component_has_a_weight() -> None:
    assert built("rewards.weights.length=0.2").rewards.weights == {"chrf": 1.0, "length": 0.2}


def test_a_later_override_goes_before_an_earlier_one() -> None:
    assert built("trainer.steps=5", "trainer.steps=7").trainer.steps == 7


def test_a_component_named_with_its_module_is_called_by_the_function() -> None:
    config = built("rewards.components=[my_rewards.text:polite]")
    assert {name: component.use for name, component in config.rewards.components.items()} == {
        "polite": "my_rewards.text:polite"
    }


@pytest.mark.parametrize("name", recipes())
def test_packaged_recipes_load_and_survive_their_own_yaml(name: str) -> None:
    overrides = ["policy.model=owner/model"]
    config = load_config(name, overrides)
    assert build_config(yaml.safe_load(config.to_yaml())) == config
    assert len(recipes()[name].read_text().splitlines()) < 60


def test_ramps_gates_and_paths_survive_their_own_yaml() -> None:
    config = built(
        "rewards.weights.chrf={start: 0, end: 1, steps: 3}",
        "rewards.components.chrf.gate={component: length, above: -5, else: 0}",
        "rewards.components.chrf.clip=[0, 0.5]",
        "policy.lora.targets=[q_proj]",
        "task.prompt=Zusammenfassung: {text} …",
    )
    assert build_config(yaml.safe_load(config.to_yaml())) == config


def test_a_run_s_own_config_file_is_a_config(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(built().to_yaml() + "versions:\n  torch: 2.13.0\n")
    assert load_config(path) == built()


def test_a_section_without_keys_has_its_defaults(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("policy: {model: a/b}\nrewards: {components: [chrf]}\nlearner:\n  # lr: 1.0e-5\n")
    assert load_config(path).learner == built().learner


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("quickstrat", "no recipe 'quickstrat'; did you mean 'quickstart'?"),
        ("my/run.yaml", "no file 'my/run.yaml'"),
        ("run.yml", "no file 'run.yml'"),
    ],
)
def test_no_such_recipe_or_file(source: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(source)
    assert str(caught.value).startswith(expected)
    assert f"(recipes: {', '.join(recipes())})" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("task: [a\nrewards: b", "not valid YAML"),
        ("task:\n\tdata: x", "not valid YAML"),
        ("- chrf\n- length", "sections such as 'task:' and 'rewards:' are needed, found a list"),
        ("", "sections such as 'task:' and 'rewards:' are needed, found nothing"),
        (b"rewards: \xff", "not valid YAML"),
        ("task:\n rows: 10\n rows: 2", "not valid YAML: line 3: the key 'rows' stands there twice, first in line 2"),
        ("task: {}\nlearner: {}\n'task': {}", "not valid YAML: line 3: the key 'task' stands there twice"),
        ("trainer: {steps: !!int x}", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_config(tmp_path: Path, text: str | bytes, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"not valid YAML|are needed") as caught:
        read_config(path)
    assert str(caught.value).startswith(f"{path}: {expected}")
    assert "\n" not in str(caught.value)
