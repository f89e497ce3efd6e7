"""Messages, chat templates and tokens of a task."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from task_factory import all_rows, as_lines, config, facts, reasons, side_by_prompt, write_lines
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rl_llm.errors import UserError
from rl_llm.policies import CausalLM, Policy
from rl_llm.table import conversational
from rl_llm.tasks import BadRow, Task, load_task, task_from_rows

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def word_tokenizer(words: str, chat_template: str | None = None, around: str = "$A") -> PreTrainedTokenizerFast:
    """A tokenizer that puts what `around` has, such as "<s> $A </s>", around each text."""
    vocab = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *dict.fromkeys(words.split())])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = [(mark, vocab[mark]) for mark in ("<s>", "</s>")]
    tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=marks)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", chat_template=chat_template
    )


def messages(count: int) -> list[dict[str, Any]]:
    return [{"dialogue": [{"role": "user", "content": f"say {i}"}], "n": i} for i in range(count)]


def test_a_column_of_messages_makes_the_task_conversational() -> None:
    rows = messages(60)
    rows[3]["dialogue"].insert(0, {"role": "system", "content": "be kind", "name": "boss"})
    task = task_from_rows(rows, config(prompt="{dialogue}"))
    assert task.conversational
    assert all(conversational(table) for table in task.splits.values())
    assert [json.loads(row["prompt"]) for row in all_rows(task)] == [row["dialogue"] for row in rows]
    # A key that only one row has must not move the others.
    assert (
        side_by_prompt(task_from_rows(messages(60)[4:], config(prompt="{dialogue}"))).items()
        <= side_by_prompt(task).items()
    )


def test_bad_messages_are_bad_rows() -> None:
    rows = messages(40)
    rows[0]["dialogue"] = []
    rows[1]["dialogue"] = [{"role": "user", "content": "  "}]
    rows[2]["dialogue"] = [{"role": "user"}]
    rows[3]["dialogue"].append({"role": "assistant", "content": "the answer"})
    rows[4]["dialogue"] = None
    assert reasons(task_from_rows(rows, config(prompt="{dialogue}"))) == {
        1: "empty prompt",
        2: "empty prompt",
        3: "a message needs a role and a content, both text",
        4: "the last message is the assistant's own; a prompt ends before the answer",
        5: "column 'dialogue' is missing or empty",
    }


def test_messages_are_the_whole_template() -> None:
    with pytest.raises(UserError, match="may be a column of messages only alone"):
        task_from_rows(messages(40), config(prompt="Chat: {dialogue}"))


WORDS = "Shorten: text say <user> <system> <assistant> kind brief " + " ".join(str(i) for i in range(60))


def decoded(tokenizer: PreTrainedTokenizerFast, task: Task, prompt_id: int) -> str:
    row = next(row for row in all_rows(task) if row["prompt_id"] == prompt_id)
    return tokenizer.decode(row["prompt_ids"])


def test_plain_prompts_are_tokenized_as_they_are() -> None:
    task = task_from_rows(facts(60), config())
    tokenizer = word_tokenizer(WORDS)
    task.tokenize(tokenizer)
    assert all(table.schema.field("prompt_ids").type == pa.list_(pa.int32()) for table in task.splits.values())
    assert all(row["prompt_ids"] == tokenizer(row["prompt"])["input_ids"] for row in all_rows(task))
    before = dict(task.splits)
    task.tokenize(tokenizer)
    assert task.splits == before


def test_prompts_that_are_too_long_are_bad_rows_of_their_line(tmp_path: Path) -> None:
    lines = as_lines(facts(60))
    lines[10:10] = ["", json.dumps({"text": "text " * 8})]
    path = write_lines(tmp_path / "d.jsonl", lines)
    task = load_task(config(path, max_prompt_tokens=8), seed=0)
    assert task.bad_rows == []
    task.tokenize(word_tokenizer(WORDS))
    assert task.bad_rows == [BadRow(str(path), 12, "the prompt has 9 tokens, task.max_prompt_tokens is 8")]
    assert len(all_rows(task)) == 60

    task = load_task(config(path, max_prompt_tokens=8, on_bad_row="fail"), seed=0)
    with pytest.raises(UserError, match=r"1 bad row: .*d\.jsonl:12: the prompt has 9 tokens"):
        task.tokenize(word_tokenizer(WORDS))
    assert "prompt_ids" not in task.splits["train"].column_names

    task = load_task(config(path, max_prompt_tokens=2), seed=0)
    with pytest.raises(
        UserError, match=r"no row of .* is left in train: 61 bad rows.*raise task\.max_prompt_tokens \(2\)"
    ):
        task.tokenize(word_tokenizer(WORDS))


def test_a_plain_prompt_can_be_sent_as_a_user_message() -> None:
    tokenizer = word_tokenizer(WORDS, CHAT_TEMPLATE)
    task = task_from_rows(facts(60), config(chat=True))
    task.tokenize(tokenizer)
    assert decoded(tokenizer, task, 5) == "<user> Shorten: text 5 <assistant>"
    assert not task.conversational
    assert not conversational(task.splits["train"])
    assert all_rows(task)[5]["prompt"] == "Shorten: text 5"
    task = task_from_rows(facts(60), config(chat=True, system="brief"))
    task.tokenize(tokenizer)
    assert decoded(tokenizer, task, 5) == "<system> brief <user> Shorten: text 5 <assistant>"


def test_messages_go_through_the_chat_template_and_keep_their_own_system_message() -> None:
    tokenizer = word_tokenizer(WORDS, CHAT_TEMPLATE)
    rows = messages(60)
    rows[7]["dialogue"].insert(0, {"role": "system", "content": "kind"})
    task = task_from_rows(rows, config(prompt="{dialogue}", system="brief"))
    task.tokenize(tokenizer)
    assert decoded(tokenizer, task, 6) == "<system> brief <user> say 6 <assistant>"
    assert decoded(tokenizer, task, 7) == "<system> kind <user> say 7 <assistant>"


def test_what_a_chat_template_refuses_is_a_bad_row() -> None:
    picky = "{% if messages|length > 1 %}{{ raise_exception('one message only') }}{% endif %}" + CHAT_TEMPLATE
    rows = messages(60)
    rows[7]["dialogue"].insert(0, {"role": "user", "content": "say"})
    task = task_from_rows(rows, config(prompt="{dialogue}"))
    task.tokenize(word_tokenizer(WORDS, picky))
    assert reasons(task) == {8: "the chat template refuses the messages: one message only"}


@pytest.mark.parametrize(
    ("around", "prompt", "expected"),
    [
        ("$A", "Shorten: {text}", "Shorten: text 5"),
        ("<s> $A", "Shorten: {text}", "<s> Shorten: text 5"),
        ("<s> $A </s>", "Shorten: {text}", "<s> Shorten: text 5"),
        # Marks that the prompt has itself: it begins with one, and ends as it is written.
        ("<s> $A", "<s> Shorten: {text}", "<s> Shorten: text 5"),
        ("<s> $A </s>", "<s> Shorten: {text}", "<s> Shorten: text 5"),
        ("$A </s>", "<s> {text}", "<s> text 5"),
        ("$A", "{text} </s>", "text 5 </s>"),
        ("$A </s>", "{text} </s>", "text 5 </s>"),
    ],
)
def test_marks_of_the_tokenizer_open_a_prompt_once_and_never_close_it(around: str, prompt: str, expected: str) -> None:
    tokenizer = word_tokenizer(WORDS, around=around)
    task = task_from_rows(facts(60), config(prompt=prompt))
    task.tokenize(tokenizer)
    assert decoded(tokenizer, task, 5) == expected


def test_end_tokens_of_a_chat_template_close_no_prompt() -> None:
    closing = "<s> {% for message in messages %}{{ message['content'] }} {{ eos_token }} {% endfor %}"
    tokenizer = word_tokenizer(WORDS, closing)
    task = task_from_rows(facts(60), config(chat=True))
    task.tokenize(tokenizer)
    assert decoded(tokenizer, task, 5) == "<s> Shorten: text 5"


def test_a_policy_that_reads_its_prompt_gets_it_with_all_marks() -> None:
    tokenizer = word_tokenizer(WORDS, around="<s> $A </s>")
    task = task_from_rows(facts(60), config())
    task.tokenize(tokenizer, continued=False)
    assert decoded(tokenizer, task, 5) == "<s> Shorten: text 5 </s>"
    assert CausalLM.continues
    assert not Policy.continues


THINKS = CHAT_TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %} brief{% endif %}"


def test_a_chat_template_gets_its_own_arguments() -> None:
    tokenizer = word_tokenizer(WORDS, THINKS)
    for args, end in (({}, "<assistant>"), ({"enable_thinking": False}, "<assistant> brief")):
        task = task_from_rows(facts(60), config(chat=True, chat_args=args))
        task.tokenize(tokenizer)
        assert decoded(tokenizer, task, 5) == f"<user> Shorten: text 5 {end}"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"enable_thinkng": False}, "task.chat_args: the tokenizer's chat template takes no argument 'enable_thinkng'"),
        ({"add_generation_prompt": False}, "task.chat_args: 'add_generation_prompt' is no choice"),
        ({"tokenize": False}, "task.chat_args: 'tokenize' is no choice of the chat template's; remove it"),
    ],
)
def test_arguments_that_a_chat_template_does_not_take_are_refused(args: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        task_from_rows(facts(60), config(chat=True, chat_args=args)).tokenize(word_tokenizer(WORDS, THINKS))


REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
) + CHAT_TEMPLATE
DROPS_SYSTEM = CHAT_TEMPLATE.replace("in messages %}", "in messages if message['role'] != 'system' %}")


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, DROPS_SYSTEM])
def test_a_chat_template_without_a_system_role_is_named_as_such(template: str) -> None:
    tokenizer = word_tokenizer(WORDS, template)
    with pytest.raises(UserError, match=r"task\.system: the tokenizer's chat template has no system role; remove"):
        task_from_rows(facts(60), config(chat=True, system="brief")).tokenize(tokenizer)
    rows = messages(60)
    rows[7]["dialogue"].insert(0, {"role": "system", "content": "kind"})
    task = task_from_rows(rows, config(prompt="{dialogue}"))
    task.tokenize(tokenizer)
    assert list(reasons(task)) == [8]
    assert "has no system role" in reasons(task)[8]


def test_messages_need_a_chat_template() -> None:
    for task in (
        task_from_rows(messages(60), config(prompt="{dialogue}")),
        task_from_rows(facts(60), config(chat=True)),
    ):
        with pytest.raises(UserError, match="the tokenizer has no chat template"):
            task.tokenize(word_tokenizer(WORDS))


def test_training_texts_are_those_of_the_train_side() -> None:
    rows: list[dict[str, Any]] = [{**row, "many": [f"m{i}", ""]} for i, row in enumerate(facts(60))]
    task = task_from_rows(rows, config())
    train = task.splits["train"].to_pylist()
    assert task.training_texts("summary") == [(row["prompt"], [row["field/summary"]]) for row in train]
    assert task.training_texts("many") == [(row["prompt"], row["field/many"][:1]) for row in train]
    rows[train[0]["prompt_id"]]["many"] = None
    assert len(task_from_rows(rows, config()).training_texts("many")) == len(train) - 1
    with pytest.raises(UserError, match=r"no field 'sumary'; did you mean 'summary'\?"):
        task.training_texts("sumary")
