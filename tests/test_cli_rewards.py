"""`rl-llm rewards` as a user meets it: what there is, and values for completions of a file."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Command, refused
from transformers import AutoTokenizer

from rl_llm.runs.jsonl import read_jsonl


def test_rewards_list(command: Command) -> None:
    said = command("rewards", "list")
    assert said.code == 0
    for name in (
        "bleu",
        "chrf",
        "ter",
        "rouge",
        "exact_match",
        "token_f1",
        "facts",
        "length",
        "vocab",
        "regex",
        "sentiment",
    ):
        assert f" {name} " in said.out
    assert "smooth_method='exp'" in said.out


def not_a_number(completions: list[str], **columns: Any) -> list[float]:
    return [float("nan")] * len(completions)


def shouts(completions: list[str], **columns: Any) -> list[float | None]:
    """1 for capitals, no value for nothing, an error for a question."""
    return [{"": None, "?": float("nan")}.get(text, float(text.isupper())) for text in completions]


def completions_file(rows: list[dict[str, Any]]) -> str:
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "answers.jsonl"


def test_rewards_score_shows_values_and_failures(command: Command) -> None:
    texts = ["HI", "hi", "", "?"]
    file = completions_file([{"completion": text, "reference": "HI"} for text in texts])
    said = command(
        "rewards", "score", file, "--use", "test_cli_rewards:shouts", "--use", "exact_match",
        "rewards.components.exact_match.args.normalize=false", "--output", "scores.jsonl",
    )  # fmt: skip
    assert (said.code, said.err) == (0, "")
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in said.out.splitlines() if "│" in line]
    assert [row[:5] for row in cells] == [
        ["shouts", "0.5000", "0.5000", "1", "1"],
        ["exact_match", "0.2500", "0.4330", "0", "0"],
    ]
    assert "shouts: returned the value nan" in said.out
    rows = read_jsonl(Path("scores.jsonl"))
    assert [row["completion"] for row in rows] == texts
    assert [row["rewards"] for row in rows] == [
        {"shouts": 1.0, "exact_match": 1.0},
        {"shouts": 0.0, "exact_match": 0.0},
        {"shouts": None, "exact_match": 0.0},
        {"shouts": None, "exact_match": 0.0},
    ]
    assert [row["status"]["shouts"] for row in rows] == ["ok", "ok", "not_applicable", "error"]


def test_rewards_score_keeps_columns_called_rewards(command: Command) -> None:
    file = completions_file([{"completion": "a b", "rewards": 7, "rewards_2": "x"}])
    said = command("rewards", "score", file, "--use", "length", "--output", "scores.jsonl")
    assert said.err == "the file has a column 'rewards' of its own; the new one is called 'rewards_3'\n"
    assert read_jsonl(Path("scores.jsonl")) == [
        {
            "completion": "a b",
            "rewards": 7,
            "rewards_2": "x",
            "rewards_3": {"length": -2.0},
            "status": {"length": "ok"},
        }
    ]


def test_rewards_score_refuses_references_that_are_none(command: Command) -> None:
    file = completions_file([{"completion": "a", "reference": ["a"]}, {"completion": "a", "reference": [["a"]]}])
    expected = (
        "answers.jsonl:2: component 'exact_match' cannot read the column 'reference': a list in a list (['a']), where"
    )
    assert expected in refused(command, "rewards", "score", file, "--use", "exact_match")


def test_rewards_score_with_a_config(command: Command) -> None:
    file = completions_file([{"answer": "red", "colour": "red"}, {"answer": "red red blue", "colour": "red"}])
    said = command("rewards", "score", file, "--config", "own.yaml", "--completion", "answer", "--output", "s.jsonl")
    assert (said.code, said.err) == (0, "")
    rewards = [row["rewards"] for row in read_jsonl(Path("s.jsonl"))]
    assert rewards == [{"match": 1.0, "length": pytest.approx(1 / 3)}, {"match": pytest.approx(2 / 3), "length": 1.0}]


def test_rewards_score_needs_no_recipe_that_could_run(command: Command) -> None:
    file = completions_file([{"completion": "a tool", "synopsis": "a tool"}])
    assert command("rewards", "score", file, "--config", "synopsis").code == 0


def needs_prompt(completions: list[str], prompts: list[str], **columns: Any) -> list[float]:
    return [float(prompt == "ask: 1") for prompt in prompts]


def test_rewards_score_passes_prompts_where_the_file_has_them(command: Command) -> None:
    file = completions_file([{"completion": "x", "n": 1}, {"completion": "y", "n": 2}])
    for template, mean in (("ask: {n}", "0.5000"), ("ask: {m}", "0.0000")):
        said = command("rewards", "score", file, "--use", "test_cli_rewards:needs_prompt", f"task.prompt={template}")
        assert mean in said.out


def polite(completions: list[list[dict[str, str]]], prompts: list[list[dict[str, str]]]) -> list[float]:
    """Reads messages, as a reward of a conversational task does."""
    pairs = zip(prompts, completions, strict=True)
    return [float(asked[-1]["role"] == "user" and "please" in said[0]["content"]) for asked, said in pairs]


def test_rewards_score_reads_completions_of_messages(command: Command) -> None:
    said = [[{"role": "assistant", "content": text}] for text in ("yes please", "no")]
    file = completions_file([{"completion": one, "q": "?", "reference": "no"} for one in said])
    for prompt in ("{q}", "{missing}"):
        shown = command(
            "rewards", "score", file, "--use", "test_cli_rewards:polite", "--use", "exact_match",
            f"task.prompt={prompt}", "--output", "scores.jsonl",
        )  # fmt: skip
        assert (shown.code, shown.err) == (0, "")
        rewards = [row["rewards"] for row in read_jsonl(Path("scores.jsonl"))]
        assert rewards == [{"polite": 1.0, "exact_match": 0.0}, {"polite": 0.0, "exact_match": 1.0}]
    file = completions_file([{"completion": ["yes", "no"]}])
    assert "column 'completion' holds ['yes', 'no'], but a text or a list of messages is needed" in refused(
        command, "rewards", "score", file, "--use", "length"
    )


@pytest.mark.parametrize(
    ("use", "settings"),
    [
        ("overlong", ["rewards.components.overlong.args={limit: 5, buffer: 4}"]),
        ("length", ["rewards.components.length.args.unit=tokens"]),
    ],
)
def test_rewards_score_counts_tokens_of_a_tokenizer(command: Command, use: str, settings: list[str]) -> None:
    file = completions_file([{"completion": text} for text in ("", "red", "red blue green", "12345")])
    assert f"component '{use}' reads tokens, and a file has none; name the model" in refused(
        command, "rewards", "score", file, "--use", use, *settings
    )
    tokenizer = AutoTokenizer.from_pretrained("model")
    counts = [len(tokenizer(text)["input_ids"]) + 1 for text in ("", "red", "red blue green", "12345")]
    assert counts[:3] == [1, 2, 4]
    expected = [max(-(count - 1) / 4, -1.0) if use == "overlong" else -count for count in counts]
    Path("rewards.yaml").write_text(yaml.safe_dump({"policy": {"model": "model"}, "rewards": {"components": [use]}}))
    for source in (["--use", use, "policy.model=model"], ["--config", "rewards.yaml"]):
        said = command("rewards", "score", file, *source, *settings, "--output", "scores.jsonl")
        assert (said.code, said.err) == (0, "")
        assert [row["rewards"][use] for row in read_jsonl(Path("scores.jsonl"))] == expected


def test_rewards_score_refuses(command: Command) -> None:
    file = completions_file([{"completion": "x"}])
    assert "--use (repeated), or with --config" in refused(command, "rewards", "score", file)
    assert "did you mean 'chrf'?" in refused(command, "rewards", "score", file, "--use", "chff")
    assert "needs a column 'reference'" in refused(command, "rewards", "score", file, "--use", "chrf")
    assert "answers.jsonl has no column 'text'; --completion names one of completion" in refused(
        command, "rewards", "score", file, "--use", "length", "--completion", "text"
    )
