"""Every algorithm on the quickstart task, from the same start: test metrics before and after, as one table.

    python benchmarks/algorithms.py [PRESET ...] [key=value ...] [--output FOLDER]

The warm start is made once and shared. A preset's settings are its own; overrides go over those of every run. The table
goes to standard output, the runs with their reports to the folder.
"""

import argparse
from pathlib import Path

from rl_llm.algorithms import PRESETS
from rl_llm.config import load_config
from rl_llm.launch.training import run_training
from rl_llm.runs.run import Run

METRICS = ("utility", "facts", "sentence", "brevity", "chrf")
# With one update a batch every ratio is 1, and losses that differ in how they clip it are the same.
SETTINGS = ("learner.minibatches=2", "evaluation.controls=[]", "logging.tensorboard=false", "logging.rollouts=0")


def train(preset: str, overrides: list[str], folder: Path) -> Run:
    config = load_config("quickstart", [*SETTINGS, *overrides, f"algorithm.name={preset}"])
    return run_training(config, folder / preset, resume=True)


def row(name: str, metrics: dict[str, dict[str, float]], before: dict[str, dict[str, float]]) -> str:
    cells = []
    for metric in METRICS:
        found, first = metrics[metric], before[metric]
        apart = found["low"] > first["high"]
        mean = f"**{found['mean']:.3f}**" if apart else f"{found['mean']:.3f}"
        cells.append(f"{mean} [{found['low']:.3f}, {found['high']:.3f}]")
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arguments", nargs="*", metavar="PRESET | key=value")
    parser.add_argument("--output", type=Path, default=Path("runs/algorithms"))
    given = parser.parse_args()
    overrides = [argument for argument in given.arguments if "=" in argument]
    presets = [argument for argument in given.arguments if "=" not in argument] or list(PRESETS)
    runs = {preset: train(preset, overrides, given.output) for preset in presets}
    print(f"\n| policy | {' | '.join(METRICS)} | steps | seconds |")
    print("|---" * (len(METRICS) + 3) + "|")
    before = runs[presets[0]].summary["before"]
    print(row("warm start", before, before), "| |")
    for preset, run in runs.items():
        summary = run.summary
        print(row(preset, summary["after"], summary["before"]), f"{summary['steps']} | {summary['seconds']:.0f} |")


if __name__ == "__main__":
    main()
