"""A GRPO step in one process, against the same step in TRL's `GRPOTrainer`.

    python benchmarks/step_vs_trl.py MODEL DATA

MODEL is a Hugging Face folder, or `scratch` for an untrained one of a million parameters. DATA is a file of texts with
a reference each, such as JSON lines. Both sides train on the same prompts: 8 of 64 tokens with 8 completions of 32
tokens each, fp32 weights, chrF as the reward, no KL. Both compute in bf16 where the processor has it and in fp32 where
it would have to be emulated, by rl-llm's own rule for `policy.precision=auto`; `--precision` sets it. Each side is a
process of its own, with its own peak memory, and the two take turns: step k of the one, then step k of the other.
The first line names processor and precision. Lines that begin with "rl-llm's" say what share of the matrix peak its
step reaches: the step's arithmetic a second, counted from the model's shape (see `count_work`), over that of a large
square product in the same precision with as many threads, measured in the same call. Rollout and learning have a line
each too: decoding reads all weights for one token of each row, so it is bound by memory.
The last line is one ratio, the median over the pairs of TRL's seconds / rl-llm's seconds.
"""

import argparse
import importlib.util
import json
import os
import platform
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
# What a processor computes matrix products with, the best first.
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


def describe_processor() -> str:
    """The processor's name, the numbers that tell it apart where the name is vague, and what it has for products."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    lines = (line.partition(":") for line in cpuinfo.read_text().split("\n\n")[0].splitlines())
    facts = {key.strip(): value.strip() for key, _, value in lines}
    flags = facts.get("flags", "").split()
    has = [name for name in INSTRUCTIONS if name in flags]
    return (
        f"{facts.get('model name', platform.machine())} (cpu family {facts.get('cpu family', '?')}, model "
        f"{facts.get('model', '?')}) with {', '.join(has) or 'none of ' + ', '.join(INSTRUCTIONS)}"
    )


def resolve_precision(precision: str) -> str:
    """`bf16` or `fp32`: as told, or what a run of rl-llm takes on this processor."""
    import torch

    from rl_llm.policies.base import wants_bf16

    return "bf16" if wants_bf16(precision, torch.device("cpu")) else "fp32"


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
    from rl_llm.launch.warm_start import ensure_base
    from rl_llm.trainer.trainer import Trainer

    config = build_config(
        {
            "task": {"data": args.data, "columns": {"reference": "reference"}},
            "policy": {"model": args.model, "precision": args.precision},
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
    plan = make_plan(config, {}, None)
    with Trainer.open(config, folder, plan.task, ensure_base(config, plan.task, print)) as trainer:
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
        bf16=args.precision == "bf16",
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
    step = {"total": total, "rollout": rollout, "learn": total - rollout, "length": length, "peak": peak_memory()}
    print(json.dumps(step | extra), flush=True, file=OUT)
    ask()


def peak_memory() -> float:
    """This process's, in GiB."""
    status = Path("/proc/self/status")
    # On Linux a started program's `ru_maxrss` begins at its parent's, so a small side would show the parent's peak.
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**20
    # macOS counts in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


SIDES = {"rl-llm": rl_llm_side, "TRL": trl_side}
# What libraries print goes to stderr; the answers have the real stdout for themselves.
OUT = sys.stdout


class Side:
    """A process that makes a step each time it is asked."""

    def __init__(self, name: str, model: str, data: Path, args: argparse.Namespace, folder: Path) -> None:
        self.name = name
        folder.mkdir()
        command = [sys.executable, __file__, model, str(data), "--side", name, "--folder", str(folder)]
        command += ["--precision", args.precision, "--threads", str(args.threads), "--trl-batch", str(args.trl_batch)]
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


def count_work(model: str) -> dict[str, float]:
    """Floating-point operations of rl-llm's step and of its parts, for a dense model whose weights all train.

    A forward pass of a token is 2 x the weights in matrices, embeddings left out and the head only where there are
    logits, and for each layer 4 x hidden x keys: 2 for the scores, 2 for the weighted values. Keys are those a token
    may see, itself included, so what a mask hides does not count; neither do norms, softmax, the optimiser, or scores
    that are made again for the backward pass.

        rollout: each prompt once for its group, head on its last token; then all tokens of each row but the last, which
                 is drawn and never read, head on every one
        learn:   3 x (forward, and twice that for backward) each prompt once for its group and all tokens of each row,
                 head for every one of these
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    modules = [module for module in lm.base_model.modules() if not isinstance(module, torch.nn.Embedding)]
    body = sum(p.numel() for module in modules for p in module.parameters(recurse=False) if p.ndim == 2)
    head = lm.get_output_embeddings().weight.numel()
    heads = lm.config.num_attention_heads
    # Of attention: a few models have heads that do not come to the hidden size.
    hidden = heads * (getattr(lm.config, "head_dim", None) or lm.config.hidden_size // heads)
    rows = PROMPTS * SAMPLES

    def keys(before: int, tokens: int) -> int:
        return sum(range(before + 1, before + tokens + 1))

    def forward(own: int, logits: int) -> int:
        products = body * (PROMPTS * PROMPT_TOKENS + rows * own) + head * logits
        seen = PROMPTS * keys(0, PROMPT_TOKENS) + rows * keys(PROMPT_TOKENS, own)
        return 2 * products + 4 * hidden * lm.config.num_hidden_layers * seen

    rollout = forward(NEW_TOKENS - 1, logits=PROMPTS + rows * (NEW_TOKENS - 1))
    learn = 3 * forward(NEW_TOKENS, logits=rows * NEW_TOKENS)
    return {"total": rollout + learn, "rollout": rollout, "learn": learn}


def measure_peak(precision: str, threads: int, size: int = 2048, times: int = 5) -> float:
    """Floating-point operations a second of a large square product, the best of some."""
    import torch

    torch.set_num_threads(threads)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b, out = (torch.randn(size, size).to(dtype) for _ in range(3))
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        # As in a linear layer, whose order of the second matrix is the one that emulated bf16 is not slowest at.
        torch.mm(a, b.t(), out=out)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def show_share(steps: list[dict[str, float]], work: dict[str, float], peak: float) -> None:
    for key, name in (("total", "step"), ("rollout", "rollout"), ("learn", "learn and rest")):
        speed = work[key] / statistics.median(step[key] for step in steps)
        print(
            f"rl-llm's {name} is {work[key] / 1e9:,.1f} GFLOP at {speed / 1e9:,.0f} GFLOP/s, "
            f"{100 * speed / peak:.0f} % of the {peak / 1e9:,.0f} GFLOP/s that a large product reaches",
            flush=True,
        )


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
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="of both sides")
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
    args.precision = resolve_precision(args.precision)
    print(f"{describe_processor()}; {args.precision}, {args.threads} threads", flush=True)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        model = build_scratch_model(args, folder / "scratch") if args.model == "scratch" else args.model
        cut_prompts(model, args, folder / "prompts.jsonl")
        sides = [
            stack.enter_context(Side(name, model, folder / "prompts.jsonl", args, folder / name))
            for name in SIDES
            if args.only in (None, name)
        ]
        # Both times the sides wait for their turn. Others share the processor, so the better one counts.
        peak = 0.0 if args.only == "TRL" else measure_peak(args.precision, args.threads)
        rounds = [[side.step() for side in sides] for _ in range(args.warm_up + args.pairs)][args.warm_up :]
        for at, side in enumerate(sides):
            show(side.name, [steps[at] for steps in rounds])
        if args.only != "TRL":
            peak = max(peak, measure_peak(args.precision, args.threads))
            show_share([steps[0] for steps in rounds], count_work(model), peak)
        if args.only == "rl-llm":
            for steps in rounds:
                print({key: round(value, 6) for key, value in steps[0].items()})
        if args.only is None:
            ratio = statistics.median(trl["total"] / ours["total"] for ours, trl in rounds)
            print(f"{ratio:.2f}")


if __name__ == "__main__":
    main()
