"""A GRPO step in one process, against the same step in TRL's `GRPOTrainer`.

    python benchmarks/step_vs_trl.py MODEL DATA

MODEL is a Hugging Face folder, or `scratch` for an untrained one of a million parameters. DATA is a file of texts with
a reference each, such as JSON lines. Both sides train on the same prompts: 8 of 64 tokens with 8 completions of 32
tokens each, bf16 over fp32 weights, chrF as the reward, no KL. Each side is a process of its own, with its own peak
memory, and the two take turns: step k of the one, then step k of the other.
The last line is one ratio, the median over the pairs of TRL's seconds / rl-llm's seconds.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

PROMPTS, SAMPLES, PROMPT_TOKENS, NEW_TOKENS = 8, 8, 64, 32
LEARNING_RATE = 1e-6


def cut_prompts(model: str, args: argparse.Namespace, path: Path) -> None:
    """Write rows whose prompt has exactly `PROMPT_TOKENS` tokens, the beginnings of longer texts."""
    from transformers import AutoTokenizer

    from rl_llm.config import TaskConfig
    from rl_llm.tasks import load_task

    tokenizer = AutoTokenizer.from_pretrained(model)
    config = TaskConfig(data=args.data, prompt="{" + args.text + "}", columns={"reference": args.reference})
    train = load_task(config, 0).splits["train"]
    texts = train["prompt"].to_pylist()
    cut = [tokenizer.decode(ids[:PROMPT_TOKENS]) for ids in tokenizer(texts)["input_ids"]]
    # Text that is cut within a character, or merges otherwise, does not come back as the same number of tokens.
    lengths = [len(ids) for ids in tokenizer(cut)["input_ids"]]
    rows = zip(cut, train["field/reference"].to_pylist(), lengths, strict=True)
    kept = {prompt: reference for prompt, reference, length in rows if length == PROMPT_TOKENS}
    path.write_text("".join(json.dumps({"prompt": p, "reference": r}) + "\n" for p, r in kept.items()))


def build_scratch_model(args: argparse.Namespace, folder: Path) -> str:
    from rl_llm.config import ScratchConfig, TaskConfig
    from rl_llm.policies.scratch import build_scratch
    from rl_llm.tasks import load_task

    task = load_task(TaskConfig(data=args.data, prompt="{" + args.text + "}"), 0)
    texts = task.splits["train"]["prompt"].to_pylist()
    build_scratch(ScratchConfig(layers=4, hidden_size=128, heads=4, vocab_size=512), texts, str(folder), 0)
    return str(folder)


def rl_llm_side(args: argparse.Namespace, folder: Path) -> None:
    from rl_llm.config import build_config
    from rl_llm.launch.preflight import make_plan
    from rl_llm.launch.training import ensure_base
    from rl_llm.runs.console import Console
    from rl_llm.trainer.trainer import Trainer

    config = build_config(
        {
            "task": {"data": args.data, "columns": {"reference": "reference"}},
            "policy": {"model": args.model, "precision": "bf16"},
            "rollout": {
                "prompts_per_step": PROMPTS,
                "samples_per_prompt": SAMPLES,
                "rows_per_request": PROMPTS * SAMPLES,
                "max_new_tokens": NEW_TOKENS,
                "min_new_tokens": NEW_TOKENS,
            },
            "rewards": {"components": ["chrf"]},
            "algorithm": {"name": "grpo"},
            "learner": {"lr": LEARNING_RATE, "tokens_per_microbatch": args.microbatch_tokens},
            "trainer": {"steps": 10_000},
            "resources": {"threads": args.threads},
        },
        args.set,
    )
    (folder / "rollouts").mkdir()
    plan = make_plan(config, {}, None)
    trainer = Trainer(config, folder, plan.task, ensure_base(config, plan.task, Console()), {}, [], Console(), None)
    trainer.crew.publish(0)
    ask()
    while True:
        start = time.perf_counter()
        metrics = trainer.step()
        total = time.perf_counter() - start
        extra = {"mismatch": metrics["mismatch"], "grad_norm": metrics["grad_norm"]}
        tell(total, metrics["time/rollout"], metrics["completion/length"], extra)


def trl_side(args: argparse.Namespace, folder: Path) -> None:
    import torch
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from rl_llm.rewards.overlap import chrf

    torch.set_num_threads(args.threads)
    clock = {"rollout": 0.0, "start": 0.0}

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            start = time.perf_counter()
            out = super()._generate_and_score_completions(inputs)
            clock["rollout"] = time.perf_counter() - start
            return out

    class Turns(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            ask()

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            clock["start"] = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            total = time.perf_counter() - clock["start"]
            length = trainer._metrics["train"]["completions/mean_length"][-1]
            tell(total, clock["rollout"], length, {})

    config = GRPOConfig(
        output_dir=str(folder),
        bf16=True,
        use_cpu=True,
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=args.trl_batch,
        gradient_accumulation_steps=PROMPTS * SAMPLES // args.trl_batch,
        gradient_checkpointing=False,
        num_generations=SAMPLES,
        max_completion_length=NEW_TOKENS,
        generation_kwargs={"min_new_tokens": NEW_TOKENS},
        temperature=1.0,
        beta=0.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=10_000,
        save_strategy="no",
        logging_steps=10_000,
        report_to="none",
        disable_tqdm=True,
        **json.loads(args.trl_settings),
    )
    data = load_dataset("json", data_files=args.data, split="train", cache_dir=str(folder / "cache"))
    trainer = Timed(args.model, reward_funcs=chrf, args=config, train_dataset=data, callbacks=[Turns()])
    trainer.train()


def ask() -> None:
    """Wait for the turn; the end of the questions is the end of the process."""
    print("ready", flush=True, file=OUT)
    if not sys.stdin.readline():
        OUT.flush()
        os._exit(0)


def tell(total: float, rollout: float, length: float, extra: dict[str, float]) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    step = {"total": total, "rollout": rollout, "learn": total - rollout, "length": length, "peak": peak, **extra}
    print(json.dumps(step), flush=True, file=OUT)
    ask()


SIDES = {"rl-llm": rl_llm_side, "TRL": trl_side}
# What libraries print goes to stderr; the answers have the real stdout for themselves.
OUT = sys.stdout


class Side:
    """A process that makes a step each time it is asked."""

    def __init__(self, name: str, model: str, data: Path, args: argparse.Namespace, folder: Path) -> None:
        self.name = name
        folder.mkdir()
        command = [sys.executable, __file__, model, str(data), "--side", name, "--folder", str(folder)]
        command += ["--threads", str(args.threads), "--trl-batch", str(args.trl_batch)]
        command += [
            "--microbatch-tokens",
            str(args.microbatch_tokens),
            "--trl-settings",
            args.trl_settings,
            *(f"--set={setting}" for setting in args.set),
        ]
        self.log = folder.with_suffix(".log").open("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self._answer()

    def step(self) -> dict[str, float]:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        step = json.loads(self._answer())
        self._answer()
        if step["length"] != NEW_TOKENS:
            raise SystemExit(f"{self.name} made completions of {step['length']} tokens, not {NEW_TOKENS}")
        return step

    def _answer(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            raise SystemExit(f"{self.name} ended:\n{self.log.read()[-3000:]}")
        return line

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


def show(name: str, steps: list[dict[str, float]]) -> None:
    total, rollout, learn = (statistics.median(s[key] for s in steps) for key in ("total", "rollout", "learn"))
    print(
        f"{name:7s} {total:7.3f} s a step = rollout {rollout:.3f} + learn and rest {learn:.3f}, "
        f"peak {max(s['peak'] for s in steps):.2f} GiB",
        flush=True,
    )


def main() -> None:
    global OUT
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a Hugging Face folder, or 'scratch'")
    parser.add_argument("data", help="a file of rows: JSON lines, CSV or Parquet")
    parser.add_argument("--text", default="description", help="column the prompts are cut from")
    parser.add_argument("--reference", default="synopsis", help="column with the reference")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=1, help="pairs of steps before the measured ones")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--microbatch-tokens", type=int, default=640, help="rl-llm's learner.tokens_per_microbatch")
    parser.add_argument("--trl-batch", type=int, default=8, help="TRL's per_device_train_batch_size")
    parser.add_argument("--trl-settings", default="{}", help="more of TRL's settings, as JSON")
    parser.add_argument("--set", action="append", default=[], help="a setting of rl-llm: section.key=value")
    parser.add_argument("--only", choices=SIDES, help="measure this side alone")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        OUT = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        SIDES[args.side](args, args.folder)
        return
    if importlib.util.find_spec("trl") is None and args.only != "rl-llm":
        raise SystemExit("this comparison needs TRL: pip install trl")
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        model = build_scratch_model(args, folder / "scratch") if args.model == "scratch" else args.model
        cut_prompts(model, args, folder / "prompts.jsonl")
        sides = [
            stack.enter_context(Side(name, model, folder / "prompts.jsonl", args, folder / name))
            for name in SIDES
            if args.only in (None, name)
        ]
        rounds = [[side.step() for side in sides] for _ in range(args.warm_up + args.pairs)][args.warm_up :]
        for at, side in enumerate(sides):
            show(side.name, [steps[at] for steps in rounds])
            if args.only == "rl-llm":
                for steps in rounds:
                    print({key: round(value, 6) for key, value in steps[0].items()})
        if args.only is None:
            ratio = statistics.median(trl["total"] / ours["total"] for ours, trl in rounds)
            print(f"{ratio:.2f}")


if __name__ == "__main__":
    main()
