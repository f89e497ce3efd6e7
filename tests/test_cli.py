"""The commands as a user meets them: what they print, what they refuse, and their exit codes."""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from conftest import Command, Tiny, refused
from transformers import AutoTokenizer

from rl_llm.config import load_config
from rl_llm.policies import CausalLM
from rl_llm.runs.jsonl import read_jsonl
from rl_llm.runs.run import Run
from rl_llm.runs.text import short


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["learner.lrr=1"], "unknown key 'learner.lrr'; did you mean 'lr'?"),
        (["trainer.steps=many"], "trainer.steps: Input should be a valid integer"),
        (["rollout.rows_per_request=7"], "must be a multiple of samples_per_prompt"),
        (["rewards.components.match=chrff"], "no reward component 'chrff'; did you mean 'chrf'?"),
        (["rewards.components.match=nowhere:f"], "cannot import 'nowhere'"),
        (["rewards.components.match=tiny_rewards:mtach"], "module 'tiny_rewards' has no 'mtach'"),
        (["rewards.components.length.args.moode=target"], "has no argument 'moode'; did you mean 'mode'?"),
        (["rewards.components.length.args.mode=short"], "component 'length', args.mode: Input should be 'penalty'"),
        (["rewards={components: [chrf]}"], "component 'chrf' needs a column 'reference'; map it with task.columns."),
        (["task.data=tsak.jsonl"], "task.data: no file tsak.jsonl; did you mean 'task.jsonl'?"),
        (["task.data=own.yaml"], "must end in one of .jsonl, .csv, .parquet"),
        (["task.data=builtin:facts"], "no generator 'builtin:facts'"),
        (["task.prompt={txt}"], "task.prompt: task.jsonl has no column 'txt'; did you mean 'text'?"),
        (["task.columns.reference=color"], "task.jsonl has no column 'color'; did you mean 'colour'?"),
        (["task.split.by=idd"], "task.split.by: task.jsonl has no column 'idd'; did you mean 'id'?"),
        (["task.split={by: id, tune: 0.001}"], "the tune side of task.jsonl is empty"),
        (["task.system=be brief"], "task.system needs a chat prompt"),
        (["task.chat_args.enable_thinking=false"], "task.chat_args needs a chat prompt"),
        (['task.prompt={"answer": 1} {text}'], "braces that are text, as in JSON, are doubled: {{ and }}"),
        (["task.max_prompt_tokens=1"], "the prompt has"),
        (["task.chat=true"], "the tokenizer has no chat template"),
        (["warm_start.supervised_steps=1"], "has no field 'reference'"),
        (["policy.model=./modle"], "policy.model: there is no folder ./modle"),
        (["policy.model=."], "is no model folder (it has no config.json)"),
        (["policy.trainable=last_layers", "policy.last_layers=3"], "policy.last_layers 3: the model has 2 layers"),
        (["policy.trainable=lora", "policy.lora.targets=[attention]"], "policy.lora.targets ['attention']"),
        (["logging.mlflow_experiment=x"], "logging.mlflow_experiment needs mlflow: pip install mlflow"),
        (["logging.wandb_project=x"], "logging.wandb_project needs wandb: pip install wandb"),
        (["trainer"], "override 'trainer': write it as section.key=value"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_is_refused_before_it_starts(
    command: Command, monkeypatch: pytest.MonkeyPatch, overrides: list[str], expected: str
) -> None:
    for module in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, module, None)
    assert expected in refused(command, "train", "own.yaml", *overrides, "--output", "run")


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda model: (model / "model.safetensors").unlink(), "has no weights"),
        (lambda model: (model / "model.safetensors").write_bytes(b"cut"), "cannot be loaded"),
        (lambda model: (model / "config.json").write_text("{"), "cannot be loaded"),
        (lambda model: (model / "config.json").write_text("{}"), "cannot be loaded"),
        (lambda model: (model / "tokenizer.json").unlink(), "its tokenizer cannot be loaded"),
        (lambda model: (model / "tokenizer.json").write_text("{}"), "its tokenizer cannot be loaded"),
    ],
)
def test_a_broken_model_folder_is_refused(
    command: Command, tiny_run: Tiny, break_it: Callable[[Path], Any], expected: str
) -> None:
    broken = Path("broken")
    broken.mkdir()
    for file in tiny_run.policy.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    break_it(broken)
    said = command("train", "own.yaml", "policy.model=broken", "--output", "run")
    assert said.code == 2
    assert said.err.startswith("error: policy.model")
    assert expected in said.err
    assert len(said.err.splitlines()) == 1
    assert not Path("run").exists()


def odd_model(folder: Path, tiny_run: Tiny) -> None:
    """A folder whose model is of an architecture that is defined in the folder alone."""
    shutil.copytree(tiny_run.policy, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "odd_of_a_test", "architectures": ["OddForCausalLM"]}
    config["auto_map"] = {"AutoConfig": "configuration_odd.Odd", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_odd.py").write_text("raise SystemExit('this code has been run')")


def test_a_model_with_code_of_its_own_is_refused_and_its_remedy_works(command: Command, tiny_run: Tiny) -> None:
    odd_model(Path("odd"), tiny_run)
    error = refused(command, "train", "own.yaml", "policy.model=odd", "--dry-run")
    assert "comes with code of its own, which is not run; have a module of yours register its classes" in error
    Path("my_odd_of_a_test.py").write_text(
        "from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM\n"
        "from rl_llm.policies import CausalLM\n"
        "class Odd(LlamaConfig):\n    model_type = 'odd_of_a_test'\n"
        "class OddForCausalLM(LlamaForCausalLM):\n    config_class = Odd\n"
        "AutoConfig.register('odd_of_a_test', Odd)\nAutoModelForCausalLM.register(Odd, OddForCausalLM)\n"
        "class Mine(CausalLM):\n    pass\n"
    )
    mine = ["policy.model=odd", "policy.type=my_odd_of_a_test:Mine"]
    said = command("train", "own.yaml", *mine, "trainer.steps=1", "evaluation.test_prompts=2", "--output", "run")
    assert (said.code, said.err) == (0, "")


def test_a_hub_that_cannot_be_reached_is_a_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error = refused(command, "train", "own.yaml", "policy.model=owner/model-of-nobody", "--dry-run")
    assert "is not in the Hub's cache here, and the Hub cannot be reached; give the folder of a copy" in error
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    error = refused(command, "train", "own.yaml", "task.data=hub:owner/data-of-nobody", "--dry-run")
    assert "task.data: could not load hub:owner/data-of-nobody" in error
    assert "or give a file" in error


def test_what_is_no_terminal_gets_plain_text(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    for arguments in (["rewards", "list"], ["rewards", "--help"], ["trian"]):
        said = command(*arguments)
        assert said.out + said.err
        assert "\x1b" not in said.out + said.err


def test_resume_needs_to_know_what(command: Command) -> None:
    assert "--resume needs --output" in refused(command, "train", "own.yaml", "--resume")


def test_output_with_something_else_in_it_is_left_alone(command: Command, tiny_run: Tiny) -> None:
    assert "holds a run already; add --resume" in refused(
        command, "train", "own.yaml", "--output", tiny_run.undisturbed
    )
    Path("papers").mkdir()
    Path("papers/thesis.txt").touch()
    assert "exists and is no run directory" in refused(command, "train", "own.yaml", "--output", "papers")
    assert "exists and is no run directory" in refused(command, "train", "own.yaml", "--output", "own.yaml")


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_resuming_with_another_config_names_the_difference(command: Command, tiny_run: Tiny, dry: list[str]) -> None:
    error = refused(
        command, "train", "own.yaml", f"task.data={tiny_run.data}", "learner.lr=1e-4", "--resume", "--output",
        tiny_run.undisturbed, *dry,
    )  # fmt: skip
    assert "learner.lr: 0.01 -> 0.0001" in error
    assert "rollout" not in error


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_folders_that_cannot_be_written_to_are_refused_before_anything_starts(
    command: Command, monkeypatch: pytest.MonkeyPatch, dry: list[str]
) -> None:
    Path("file").touch()
    assert "/file/run cannot be written to (Not a directory); name another --output" in refused(
        command, "train", "own.yaml", "--output", "file/run", *dry
    )
    warm = ("train", "own.yaml", "warm_start.supervised_steps=1", "warm_start.target=colour", "--output", "run", *dry)
    monkeypatch.setenv("RL_LLM_CACHE", str(Path("file/cache").absolute()))
    assert "cannot be written to (Not a directory); set RL_LLM_CACHE" in refused(command, *warm)
    monkeypatch.delenv("RL_LLM_CACHE")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where there is no HOME
    assert "there is no home folder to keep warm-started models in; set RL_LLM_CACHE" in refused(command, *warm)


def test_dry_run_prints_config_actors_and_memory_and_starts_nothing(command: Command) -> None:
    before = sorted(Path().iterdir())
    said = command("train", "own.yaml", "resources.num_rollout_workers=2", "resources.threads=3", "--dry-run")
    assert (said.code, said.err) == (0, "")
    assert sorted(Path().iterdir()) == before
    config, _, plan = said.out.partition("\n\n")
    assert yaml.safe_load(config)["resources"]["num_rollout_workers"] == 2
    lines = plan.splitlines()
    assert [line.split()[0] for line in lines] == [
        *["task", "policy", "prompt", "tokens", "probe", "rewards", "step"], *["actor"] * 3, "memory"
    ]  # fmt: skip
    assert "actor      2 x rollout worker: 1 CPU, 0 GPU, torch threads: 3 each" in lines
    assert "actor      learner in this process, torch threads: 3" in lines
    assert "3 a step" in lines[6]
    assert re.fullmatch(r"probe      engine \S+ and learner \S+ nats off the model's own forward", lines[4])
    text = ast.literal_eval(lines[2].removeprefix("prompt     "))
    assert text.strip() in {row["text"] for row in tiny.rows()}
    ids = AutoTokenizer.from_pretrained("model")(text.strip())["input_ids"]
    assert lines[3] == f"tokens     {len(ids)}: {' '.join(map(str, ids))}"


def test_dry_run_counts_what_trains(command: Command) -> None:
    for overrides in (
        ["policy.trainable=all"],
        ["policy.trainable=last_layers", "policy.last_layers=1"],
        ["policy.trainable=lora", "policy.lora.r=4"],
    ):
        policy = CausalLM("model", load_config("own.yaml", overrides).policy)
        counts = (policy.trainable.values(), policy.model.parameters())
        trainable, total = (sum(p.numel() for p in parameters) for parameters in counts)
        said = command("train", "own.yaml", *overrides, "--dry-run")
        weights = total - trainable if "lora" in overrides[0] else total
        assert f"{short(weights)} parameters, {short(trainable)} of them train" in said.out


def test_dry_run_names_bad_rows(command: Command) -> None:
    with Path("task.jsonl").open("a") as file:
        file.write('{"id": "48", "text": ""}\n')
    said = command("train", "own.yaml", "--dry-run")
    assert "1 bad row: task.jsonl:49: empty prompt" in said.out


def test_dry_run_and_evaluate_tell_of_prompts_on_both_sides(command: Command) -> None:
    rows = read_jsonl(Path("task.jsonl"))
    Path("task.jsonl").write_text("".join(json.dumps({**row, "text": rows[0]["text"]}) + "\n" for row in rows))
    said = command("train", "own.yaml", "--dry-run")
    assert "\nwarning    " in said.out
    assert " test rows have a prompt that is in train too, so they are not held out; task.split.by: prompt" in said.out
    said = command("evaluate", "model", "--config", "own.yaml", "rollout.max_new_tokens=1")
    assert " test rows have a prompt that is in train too" in said.err


@pytest.mark.parametrize("recipe", ["quickstart", "article"])
def test_packaged_recipes_that_need_no_file_pass_a_dry_run(command: Command, recipe: str) -> None:
    said = command("train", recipe, "task.rows=50", "--dry-run")
    assert (said.code, said.err) == (0, "")


def test_train_ends_with_a_table_and_where_things_are(command: Command) -> None:
    said = command("train", "own.yaml", "trainer.steps=1", "--output", "out/run")
    assert (said.code, said.err) == (0, "")
    assert "step 1/1" in said.out
    assert "before" in said.out
    run = Path("out/run").absolute()
    assert said.out.splitlines()[-1] == f"run {run}  model {run / 'model'}  report {run / 'report.html'}"
    assert Run("out/run").summary["status"] == "finished"


def test_evaluate_a_run(command: Command, tiny_run: Tiny) -> None:
    said = command("evaluate", tiny_run.undisturbed)
    assert (said.code, said.err) == (0, "")
    after = Run(tiny_run.undisturbed).summary["after"]
    for name in ("match", "length"):
        [row] = [line for line in said.out.splitlines() if f" {name} " in line]
        assert f"{after[name]['mean']:.3f}" in row
    assert "8 prompts of the test split" in said.out


def test_evaluate_a_plain_model(command: Command) -> None:
    assert "evaluate needs --config" in refused(command, "evaluate", "model")
    assert "--split dev: choose one of train, tune, test" in refused(
        command, "evaluate", "model", "--config", "own.yaml", "--split", "dev"
    )
    said = command("evaluate", "model", "--config", "own.yaml", "--split", "tune", "evaluation.test_prompts=5")
    assert (said.code, said.err) == (0, "")
    assert "5 prompts of the tune split" in said.out


def test_evaluate_needs_no_model_in_its_config(command: Command) -> None:
    raw = yaml.safe_load(Path("own.yaml").read_text())
    Path("own.yaml").write_text(yaml.safe_dump({**raw, "policy": {}}))
    assert command("evaluate", "model", "--config", "own.yaml").code == 0


def test_evaluate_says_what_failed(command: Command) -> None:
    said = command(
        "evaluate", "model", "--config", "own.yaml", "rewards.components.none=test_cli_rewards:not_a_number",
        "rewards.components.none.max_failure_rate=1",
    )  # fmt: skip
    assert said.code == 0
    assert "none failed on 8 rows, error: returned the value nan" in said.err


def test_predict_writes_a_completion_a_row(command: Command, tiny_run: Tiny) -> None:
    said = command("predict", tiny_run.undisturbed, "task.jsonl", "--output", "new/folder/out.jsonl")
    assert said == (0, "48 completions in new/folder/out.jsonl\n", "")
    rows = read_jsonl(Path("new/folder/out.jsonl"))
    asked = read_jsonl(Path("task.jsonl"))
    assert [{key: row[key] for key in asked[0]} for row in rows] == asked
    assert all(row["finish"] in ("stop", "length") and isinstance(row["completion"], str) for row in rows)


def test_predict_prints_where_no_output_is_named_and_takes_one_row(command: Command) -> None:
    Path("one.jsonl").write_text('{"question": "1 please red"}\n')
    said = command("predict", "model", "one.jsonl", "task.prompt={question}", "rollout.max_new_tokens=4")
    assert (said.code, said.err) == (0, "")
    assert json.loads(said.out)["question"] == "1 please red"


def test_predict_writes_the_rows_of_the_file_as_they_were_read(command: Command) -> None:
    rows = [
        {"text": "1 please red", "n": 7, "info": {"a": 1}, "completion": "mine", "finish": [["x"]], "completions": 1},
        {"text": "2 please red", "n": 0.5, "info": {"b": None}, "completion": "own", "finish": [], "completions": 2},
    ]
    file = "rows.jsonl"
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert '"n": 7,' in Path(file).read_text()
    Path(file).write_text(Path(file).read_text().replace("null", "NaN"))
    said = command("predict", "model", file, "task.prompt={text}", "rollout.max_new_tokens=2")
    assert said.err.splitlines() == [
        f"the file has a column '{name}' of its own; the new one is called '{name}_2'"
        for name in ("completion", "finish")
    ]
    written = [json.loads(line, parse_constant=pytest.fail) for line in said.out.splitlines()]
    assert [repr({key: row[key] for key in rows[0]}) for row in written] == list(map(repr, rows))
    assert all(isinstance(row["completion_2"], str) and row["finish_2"] in ("stop", "length") for row in written)


def test_predict_does_not_stop_at_the_rows_that_training_was_given(command: Command) -> None:
    raw = yaml.safe_load(Path("own.yaml").read_text())
    Path("model").unlink()
    Path("run").mkdir()
    (Path("run") / "config.yaml").write_text(yaml.safe_dump({**raw, "task": {**raw["task"], "rows": 12}}))
    (Path("run") / "model").symlink_to(raw["policy"]["model"])
    assert len(command("predict", "run", "task.jsonl").out.splitlines()) == 48


@pytest.mark.parametrize("name", ["text", "question"])
def test_predict_reads_a_mapped_column_of_the_template_under_either_name(command: Command, name: str) -> None:
    Path("one.jsonl").write_text(json.dumps({name: "1 please red", "other": "x"}) + "\n")
    mapped = "task.columns={question: text, reference: colour}"
    said = command("predict", "model", "one.jsonl", mapped, "task.prompt={question}", "rollout.max_new_tokens=4")
    assert (said.code, said.err) == (0, "")
    assert json.loads(said.out).items() >= {name: "1 please red", "other": "x"}.items()
    assert json.loads(said.out).keys() == {name, "other", "completion", "finish"}


def test_predict_names_the_rows_it_leaves_out(command: Command) -> None:
    Path("some.jsonl").write_text('{"text": ""}\n{"text": "1 now red"}\nno json\n')
    said = command("predict", "model", "some.jsonl", "task.prompt={text}", "rollout.max_new_tokens=2")
    assert len(said.out.splitlines()) == 1
    assert said.err.startswith("2 bad rows: some.jsonl:1: empty prompt; some.jsonl:3: not JSON")


def test_predict_refuses(command: Command, tiny_run: Tiny) -> None:
    Path("other.jsonl").write_text('{"question": "1 please red"}\n')
    run = tiny_run.undisturbed
    assert "other.jsonl has no column 'text'" in refused(command, "predict", run, "other.jsonl")
    assert "no file others.jsonl; did you mean 'other.jsonl'?" in refused(command, "predict", run, "others.jsonl")
    assert "there is no folder ./nothing" in refused(command, "predict", "./nothing", "other.jsonl")
    assert "--output .: Is a directory" in refused(command, "predict", run, "task.jsonl", "--output", ".")


def test_replay(command: Command, tiny_run: Tiny) -> None:
    said = command("replay", tiny_run.undisturbed, "--weights", "match=0, length=1")
    assert (said.code, said.err) == (0, "")
    assert "of samples, by step" in said.out
    run = tiny_run.undisturbed
    assert "no such component; did you mean 'match'?" in refused(command, "replay", run, "--weights", "mach=1")
    assert "write it as name=number,name=number" in refused(command, "replay", run, "--weights", "match")
    assert "is not a finite number" in refused(command, "replay", run, "--weights", "match=nan")
    assert "model is no run directory" in refused(command, "replay", "model", "--weights", "match=1")


def test_report(command: Command, tiny_run: Tiny) -> None:
    said = command("report", tiny_run.undisturbed)
    assert said == (0, f"{tiny_run.undisturbed / 'report.html'}\n", "")
    assert "model is no run directory" in refused(command, "report", "model")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("trian own.yaml", "No such command 'trian'. Did you mean 'train'?"),
        ("train own.yaml --outptu x", "No such option: --outptu"),
        ("train", "Missing argument 'RECIPE|FILE'"),
        ("replay run", "Missing option '--weights'"),
    ],
)
def test_a_mistyped_command_line(command: Command, arguments: str, expected: str) -> None:
    said = command(*arguments.split())
    assert said.code == 2
    assert expected in said.err


def test_the_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Nothing but the error reaches the terminal, and the shell sees it."""
    run = subprocess.run(
        [sys.executable, "-m", "rl_llm.cli", "train", "quickstrat"], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 2
    assert run.stdout == ""
    assert run.stderr.splitlines()[0].startswith("error: no recipe 'quickstrat'; did you mean 'quickstart'?")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_before_the_first_step_says_how_to_go_on(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*given: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("rl_llm.launch.training.prepare_base", interrupt)
    said = command("train", "own.yaml", "--output", "run")
    assert said.code == 130
    assert said.out.endswith("stopped at once in run; go on with: rl-llm train own.yaml --output run --resume\n")
