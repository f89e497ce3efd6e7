"""Components: known values, what they accept, and each way they can fail."""

import asyncio
import itertools
import json
import math
import sys

import numpy as np
import pyarrow as pa
import pytest

from rl_llm.config import ComponentConfig
from rl_llm.errors import RunFailed, UserError
from rl_llm.rewards import (
    GIVE_UP_AFTER,
    Component,
    RewardWorker,
    Scores,
    deadline_s,
    known,
    resolve,
    reward,
)
from rl_llm.rewards.component import CANCEL_GRACE_S
from rl_llm.table import mark_conversational


def rows(completions, conversational=False, ids=None, **fields):
    prompts = [json.dumps([{"role": "user", "content": "?"}]) if conversational else "?"] * len(completions)
    table = pa.table(
        {
            "prompt_id": pa.array(range(len(completions)), pa.int64()),
            "prompt": prompts,
            "completion": pa.array(completions, pa.string()),
            "completion_ids": pa.array(ids or [[0]] * len(completions), pa.list_(pa.int32())),
            **{f"field/{name}": values for name, values in fields.items()},
        }
    )
    return mark_conversational(table) if conversational else table


def component(use="mine", fn=None, **settings):
    return Component("mine", ComponentConfig(use=use, **settings), fn)


def values(use, completions, args=None, ids=None, **fields):
    scores = component(use, args=args or {}).score(rows(completions, ids=ids, **fields))
    assert scores.errors == []
    return scores.values


def number_of(text):
    """The reward most tests here use: the text read as a number."""
    return float(text)


# ---- known values


@pytest.mark.parametrize(
    ("use", "best"), [("bleu", 1), ("chrf", 1), ("ter", 0), ("rouge", 1), ("exact_match", 1), ("token_f1", 1)]
)
@pytest.mark.parametrize("text", ["two words", "the cat sat on the mat", "一只 猫 坐在 垫子 上"])
def test_the_reference_itself_scores_best(use, best, text):
    assert values(use, [text], reference=[text]) == pytest.approx([best])
    assert values(use, [text], reference=[["another", None, text]]) == pytest.approx([best])


@pytest.mark.parametrize("use", ["bleu", "chrf", "ter", "rouge", "exact_match", "token_f1"])
def test_a_row_without_reference_has_no_value(use):
    scores = component(use).score(rows(["a", "b c"], reference=[None, "b c"]))
    assert scores.values[0] is None
    assert scores.status == ["not_applicable", "ok"]


@pytest.mark.parametrize(("use", "worst"), [("bleu", 0), ("chrf", 0), ("ter", -1), ("rouge", 0), ("token_f1", 0)])
def test_an_empty_completion_scores_worst(use, worst):
    assert values(use, [""], reference=["some text"]) == [worst]


def test_overlap_values():
    reference = ["the cat sat on the mat"]
    assert values("ter", ["the cat sat on mat"], reference=reference) == pytest.approx([-1 / 6])
    assert values("rouge", ["cat the sat"], {"kind": "1"}, reference=reference) == pytest.approx([2 * 3 / 9])
    assert values("rouge", ["cat the sat"], {"kind": 2}, reference=reference) == [0]
    assert values("rouge", ["cat the sat"], {"kind": "L"}, reference=reference) == pytest.approx([2 * 2 / 9])
    (chrf,), (chrf_pp,) = (values("chrf", ["a mat"], {"word_order": n}, reference=reference) for n in (0, 2))
    assert chrf != chrf_pp
    (zh,) = values("bleu", ["我喜欢大的红色苹果"], {"tokenize": "zh"}, reference=["我喜欢红色苹果"])
    assert 0 < zh < 1


def test_chrf_of_a_group_is_the_librarys_of_each():
    from sacrebleu.metrics import CHRF

    texts = ["a mat", "the cat", "", "a dog", "the dog"]
    given = [["the cat sat", "a mat"], ["the cat sat", "a mat"], ["the cat"], ["the dog"], None]
    expected = [CHRF().sentence_score(text, refs).score / 100 for text, refs in zip(texts[:4], given[:4], strict=True)]
    assert values("chrf", texts, reference=given) == [*expected, None]


def test_rouge_reads_any_script():
    assert values("rouge", ["北京大学", "हिन्दी भाषा"], reference=["北京", "हिन्दी भाषा"]) == pytest.approx(
        [2 * 2 / 6, 1]
    )


def test_answers_by_the_rules_of_squad():
    assert values("exact_match", ["The Eiffel Tower!"], reference=["eiffel tower"]) == [1]
    assert values("exact_match", ["The Eiffel Tower!"], {"normalize": False}, reference=["eiffel tower"]) == [0]
    assert values("exact_match", ["The $5 e-mail"], {"normalize": "squad"}, reference=["5 email"]) == [1]
    assert values("exact_match", ["la tour"], {"language": "fr"}, reference=[["le pont", "la tour"]]) == [1]
    assert values("exact_match", ["42."], reference=[42]) == [1]
    assert values("token_f1", ["a red cat"], reference=["the cat"]) == pytest.approx([2 / 3])
    assert values("token_f1", ["a"], {"language": "fr"}, reference=["b"]) == [0]
    assert values("token_f1", ["北京大学", "。", "x"], reference=["北京", "", ""]) == pytest.approx([2 / 3, 1, 0])


def test_length():
    texts = ["one two three", "", "a b c d e f"]
    assert values("length", texts) == [-3, 0, -6]
    assert values("length", texts, {"unit": "characters"}) == [-13, 0, -11]
    assert values("length", texts, {"unit": "tokens"}, ids=[[1], [1, 2], []]) == [-1, -2, 0]
    assert values("length", texts, {"mode": "target", "target": 3}) == [1, 0, 0]
    assert values("length", texts, {"mode": "target", "target": 3, "tolerance": 6}) == [1, 0.5, 0.5]
    assert values("length", texts, {"mode": "window", "min": 1, "max": 4, "tolerance": 4}) == [1, 0.75, 0.5]
    assert values("length", texts, {"mode": "window", "min": 4}) == pytest.approx([0.75, 0, 1])


@pytest.mark.parametrize(
    "args", [{"mode": "target"}, {"target": 3}, {"mode": "window"}, {"mode": "window", "min": 3, "max": 2}]
)
def test_length_refuses_settings_that_do_not_go_together(args):
    with pytest.raises(UserError, match="component 'mine'"):
        component("length", args=args)


def test_overlong_punishes_from_the_buffer_on():
    lengths = [16384, 18432, 20480, 20481]
    ids = [range(n) for n in lengths]
    assert values("overlong", [""] * 4, {"limit": 20480, "buffer": 4096}, ids=ids) == [0, -0.5, -1, -1]


def test_vocab():
    texts = ["a b a b a b", "a b c", "a", ""]
    assert values("vocab", texts) == [2, 3, 1, 0]
    assert values("vocab", texts, {"kind": "repetition"}) == pytest.approx([-3 / 5, 0, 0, 0])
    assert values("vocab", texts, {"kind": "distinct", "n": 1}) == pytest.approx([2 / 6, 1, 1, 0])
    assert values("vocab", texts, {"kind": "distinct"}) == pytest.approx([2 / 6, 2 / 3, 0, 0])


def test_regex():
    assert values("regex", ["ab1", "1"], {"pattern": r"\d"}) == [1, 1]
    assert values("regex", ["ab1", "1"], {"pattern": r"\d", "match": "full"}) == [0, 1]
    assert values("regex", ["ab1", "x"], {"pattern": r"\d", "want": False}) == [0, 1]


def test_sentiment():
    good, bad, neutral = values("sentiment", ["a wonderful, great film", "a terrible, awful film", "a film"])
    assert bad < neutral == 0 < good
    assert values("sentiment", ["great " * 50])[0] > 0.99


@pytest.mark.parametrize("use", sorted(known()))
def test_built_ins_read_messages_and_stay_in_their_range(use):
    args = {
        "regex": {"pattern": "cat"},
        "overlong": {"limit": 3, "buffer": 2},
        "facts": {"columns": ["reference", "n"]},
    }.get(use, {})
    texts = ["the cat sat, happy", "", "dog " * 30]
    fields = {
        "reference": ["the cat sat", ["a cat", "the dog"], "x"],
        "language": ["?"] * 3,
        "n": [0] * 3,
        "kind": [0] * 3,
    }
    plain = component(use, args=args).score(rows(texts, **fields_of(fields)))
    messages = component(use, args=args).score(rows(texts, conversational=True, **fields_of(fields)))
    assert messages.values == plain.values
    assert plain.status == ["ok"] * 3
    low, high = known()[use].range
    assert all(low <= value <= high for value in plain.values)


def fields_of(fields):
    # Arrow columns have one type: references become lists throughout.
    lists = [[one] if isinstance(one, str) else one for one in fields["reference"]]
    return {**fields, "reference": lists}


# ---- finding components and binding their arguments


def test_known_describes_each_component():
    info = known()["chrf"]
    assert (info.range, info.columns) == ((0, 1), ["reference"])
    assert info.arguments == {"word_order": "0", "lowercase": "False"}
    assert info.summary.startswith("chrF2")
    assert known()["regex"].arguments["pattern"] == "required"
    assert "mode" in known()["length"].arguments


def test_reward_registers_and_refuses_a_name_taken():
    name = "registered_by_a_test"

    @reward(name, range=(0, 1))
    def mine(completions):
        return [0.0] * len(completions)

    assert resolve(name) is mine
    assert reward(name, range=(0, 1))(mine) is mine
    with pytest.raises(UserError, match=name):
        reward(name, range=(0, 1))(number_of)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("chrff", "did you mean 'chrf'"),
        ("no_such_module_xyz:f", "cannot import 'no_such_module_xyz'"),
        ("math:no_such_function", "has no 'no_such_function'"),
        ("math:pi", "not a function"),
    ],
)
def test_resolve_says_what_is_wrong(use, message):
    with pytest.raises(UserError, match=message):
        resolve(use)


def test_a_module_in_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "rewards_of_a_test.py").write_text("def f(completions):\n    return [1.0] * len(completions)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert component("rewards_of_a_test:f").score(rows(["a"])).values == [1.0]
    (tmp_path / "broken_of_a_test.py").write_text("import no_such_module_xyz\n")
    with pytest.raises(UserError, match="No module named 'no_such_module_xyz'"):
        resolve("broken_of_a_test:f")


def test_a_module_in_the_current_folder_may_import_its_neighbours_when_called(tmp_path, monkeypatch):
    (tmp_path / "neighbour_of_a_test.py").write_text("VALUE = 0.5\n")
    (tmp_path / "lazy_of_a_test.py").write_text(
        "def f(completions):\n    import neighbour_of_a_test as n\n    return [n.VALUE] * len(completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = list(sys.path)
    resolve("math:sqrt")
    assert sys.path == before
    assert component("lazy_of_a_test:f").score(rows(["a"])).values == [0.5]
    resolve("lazy_of_a_test:f")
    assert sys.path == [*before, str(tmp_path)]


def cased(completions, *, upper=True, **columns):
    return [float(text.isupper() == upper) for text in completions]


@pytest.mark.parametrize(
    ("use", "args", "message"),
    [
        ("chrf", {"word_ordr": 2}, "did you mean 'word_order'"),
        ("chrf", {"word_order": "two"}, r"args.word_order: .*given: 'two'"),
        ("rouge", {"kind": "3"}, r"args.kind"),
        ("sentiment", {"x": 1}, "'x'; it takes none"),
        ("regex", {}, r"needs args.pattern"),
        ("regex", {"pattern": "("}, r"args.pattern"),
        ("vocab", {"n": 0}, r"args.n"),
        ("exact_match", {"normalize": True}, r"args.normalize: .*'answer', 'squad' or False"),
        ("length", {"mod": "target"}, "did you mean 'mode'"),
        ("test_rewards:cased", {"upper": "no"}, "args.upper: 'no' is a text; write true or false"),
    ],
)
def test_arguments_are_checked_when_built(use, args, message):
    with pytest.raises(UserError, match=message):
        component(use, args=args)


def test_missing_columns_are_named():
    component("chrf").check_columns(["reference", "x"])
    component("length").check_columns([])
    with pytest.raises(
        UserError, match=r"needs a column 'reference'; map it with task.columns.reference: <one of x, y>"
    ):
        component("chrf").check_columns(["y", "x"])


def test_only_what_the_signature_accepts_is_passed():
    seen = {}

    def few(completions, label):
        seen["few"] = label
        return [0.0] * len(completions)

    def rest(prompts, limit=3, **columns):
        seen["rest"] = (prompts, limit, sorted(columns))
        return [0.0] * len(prompts)

    table = rows(["a"], label=["x"], other=[1])
    component(fn=few).score(table)
    component(fn=rest, args={"limit": 5}).score(table)
    others = ["completion_ids", "completions", "label", "log_extra", "log_metric", "other", "trainer_state"]
    assert seen == {"few": ["x"], "rest": (["?"], 5, others)}


def test_a_class_is_built_with_its_arguments_and_set_up_once():
    class Constant:
        calls = 0

        def __init__(self, label=1.0):
            self.label = label

        def setup(self):
            Constant.calls += 1

        def __call__(self, completions, label):
            return [self.label + one for one in label]

    mine = component(fn=Constant, args={"label": 0.5})
    assert Constant.calls == 0
    table = rows(["a", "b"], label=[1, 2])
    assert mine.score(table).values == mine.score(table).values == [1.5, 2.5]
    assert Constant.calls == 1


def test_a_failing_setup_ends_the_run_by_name():
    class Broken:
        def setup(self):
            raise OSError("no model")

        def __call__(self, completions):
            return [0.0] * len(completions)

    with pytest.raises(RunFailed, match=r"'mine'.*OSError: no model"):
        component(fn=Broken).score(rows(["a"]))


def test_a_reward_worker_sets_up_when_it_is_built():
    class Counted:
        calls = 0

        def setup(self):
            Counted.calls += 1

        def __call__(self, completions):
            return [float(Counted.calls)] * len(completions)

    worker = RewardWorker({"mine": ComponentConfig(use="function:mine")}, {"mine": Counted})
    assert Counted.calls == 1
    assert worker.score("mine", rows(["a"])).values == [1.0]


# ---- TRL's own functions


def test_trl_rewards_run_as_they_are():
    trl = pytest.importorskip("trl.rewards")
    texts = ["<think>\nwhy\n</think>\nyes", "no thought"]
    assert component("trl.rewards:think_format_reward").score(rows(texts, conversational=True)).values == [1.0, 0.0]
    overlong = trl.get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    scores = component(fn=overlong).score(rows(texts, ids=[[1] * 90, [1] * 10]))
    assert scores.values == [-0.5, 0.0]


# ---- async


async def async_number(completions, **columns):
    await asyncio.sleep(0)
    return [number_of(text) for text in completions]


def test_async_components_run_with_and_without_a_loop_in_the_thread():
    mine = component(fn=async_number)
    table = rows(["1", "2"])
    assert mine.score(table).values == [1, 2]

    async def notebook():
        return mine.score(table).values

    assert asyncio.run(notebook()) == [1, 2]


def test_an_async_deadline_is_a_timeout_of_the_slow_row_only():
    async def slow(completions):
        if "slow" in completions:
            await asyncio.Event().wait()
        return [1.0] * len(completions)

    scores = component(fn=slow, timeout_s=0.2).score(rows(["a", "slow", "b"]))
    assert scores.status == ["ok", "timeout", "ok"]
    assert scores.values == [1, None, 1]
    assert scores.errors == ["TimeoutError: no values within 0.2 s"]


def test_only_async_components_have_time_to_be_cancelled_in_their_worker():
    class Async:
        async def __call__(self, completions):
            return [1.0] * len(completions)

    class Plain:
        def __call__(self, completions):
            return [1.0] * len(completions)

    config = ComponentConfig(use="length", timeout_s=2)
    assert [deadline_s(config, fn) for fn in (None, number_of, Plain, Plain())] == [2] * 4
    assert [deadline_s(config, fn) for fn in (async_number, Async, Async())] == [2 + CANCEL_GRACE_S] * 3


# ---- failures


def test_an_exception_is_pinned_to_its_rows():
    scores = component(fn=lambda completions: [number_of(text) for text in completions]).score(rows(["1", "x", "3"]))
    assert scores.values == [1, None, 3]
    assert scores.status == ["ok", "error", "ok"]
    assert scores.errors == ["ValueError: could not convert string to float: 'x'"]
    assert scores.retried == {}


@pytest.mark.parametrize("bad", [math.nan, math.inf, "0.5", [1.0], np.array([1.0])])
def test_what_is_no_finite_number_is_an_error_of_that_row_alone(bad):
    calls = []

    def mine(completions):
        calls.append(list(completions))
        return [bad if text == "bad" else 1 for text in completions]

    scores = component(fn=mine).score(rows(["a", "bad", "b"]))
    assert scores.status == ["ok", "error", "ok"]
    assert scores.values == [1, None, 1]
    assert calls == [["a", "bad", "b"], ["bad"]]


def test_a_wrong_count_is_told_and_mended_row_by_row():
    scores = component(fn=lambda completions: [0.5] * min(len(completions), 3)).score(rows(["a"] * 8))
    assert scores.values == [0.5] * 8
    assert scores.errors == ["returned 3 values for 8 completions"]
    assert scores.retried == dict.fromkeys(range(8), "error")


def test_no_list_is_an_error():
    assert component(fn=lambda completions: 1.0).score(rows(["a", "b"])).status == ["error", "error"]


def test_none_is_no_failure_and_is_not_tried_again():
    calls = []
    scores = component(fn=lambda completions: calls.append(1) or [None] * len(completions)).score(rows(["a", "b"]))
    assert (scores.status, scores.errors, len(calls)) == (["not_applicable"] * 2, [], 1)


def test_retries_are_bounded_where_every_row_fails():
    calls = itertools.count()

    def broken(completions):
        next(calls)
        raise RuntimeError("down")

    scores = component(fn=broken).score(rows(["a"] * 50))
    assert scores.status == ["error"] * 50
    assert next(calls) == 1 + GIVE_UP_AFTER


def test_a_row_sent_by_itself_is_called_once():
    calls = itertools.count()

    def broken(completions):
        next(calls)
        raise RuntimeError("down")

    mine = component(fn=broken)
    table = rows(["a", "b"])
    parts = [mine.score(table.slice(row, 1)) for row in range(2)]
    merged = Scores.merge(parts)
    assert (merged.status, merged.errors, next(calls)) == (["error"] * 2, ["RuntimeError: down"], 2)


def test_an_interrupt_passes_through():
    def interrupted(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        component(fn=interrupted).score(rows(["a"]))


def test_numpy_and_torch_scalars_are_numbers():
    torch = pytest.importorskip("torch")
    table = rows(["a", "b"])
    assert component(fn=lambda completions: np.float32([0.5, 1])).score(table).values == [0.5, 1]
    assert component(fn=lambda completions: torch.tensor([0.5, 1])).score(table).values == [0.5, 1]
    assert component(fn=lambda completions: [True, np.int64(2)]).score(table).values == [1, 2]


def test_no_rows_are_no_call():
    assert component(fn=lambda completions: 1 / 0).score(rows([])).values == []
