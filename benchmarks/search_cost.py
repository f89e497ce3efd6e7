"""What early stopping saves in a search, and what it costs: complete runs, and each scheduler replayed over them.

    python benchmarks/search_cost.py [--file FILE] [--seeds 5] [--output FOLDER] [key=value ...]

For each search seed all 12 trials of a search are trained to their end, once, and each one's best policy is measured
on the test split. A paused trial that goes on is the run left alone, so a scheduler's search over the same trials is
exactly its decisions over these runs' evaluations; no training is needed for that. The first seed's search by halving
is then run for real too: each of its decisions has to be the replayed one, with the same numbers, and its seconds are
set against those of the complete runs. The spread from seed to seed is that of the first point, equal weights, over
three seeds.
Further arguments are overrides of the search in the file, by default tune_configs/quickstart.yaml, without finalists.

What is there already is not made again: an interrupted benchmark goes on.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

# As the commands do, and before torch is there: threads that wait spinning slow the processes beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np

from rl_llm.files import write_text
from rl_llm.launch.inference import config_for, evaluate
from rl_llm.runs.reader import RunFiles
from rl_llm.search.config import SearchConfig, load_search
from rl_llm.search.course import Course, Report
from rl_llm.search.launching import run_search
from rl_llm.search.ledger import Ledger
from rl_llm.search.plan import make_course, make_space

FILE = Path(__file__).parents[1] / "tune_configs" / "quickstart.yaml"
ALONE = ("trials=12", "finalists=0", "controls=false", "forecast=0", "overoptimized=0")
SLOTS = 2
SCHEDULERS = ("halving", "asha")


def settings(seed: int, scheduler: str, given: argparse.Namespace) -> SearchConfig:
    return load_search(given.file, [*ALONE, *given.overrides, f"seed={seed}", f"scheduler={scheduler}"])


def course_of(search: SearchConfig, ledger: Ledger) -> Course:
    return make_course(search, make_space(search), [], ledger)


def complete(seed: int, given: argparse.Namespace) -> tuple[Course, float]:
    """A search whose trials all run to their end, and its seconds."""
    search, path = settings(seed, "none", given), given.output / f"complete-{seed}"
    seconds = timed(search, path)
    return course_of(search, Ledger(path / "decisions.jsonl")), seconds


def timed(search: SearchConfig, path: Path) -> float:
    """Seconds of a search; of one that is there already, those that were noted. One that was interrupted has none."""
    noted = path.with_suffix(".seconds")
    if noted.is_file():
        return float(noted.read_text())
    fresh, start = not path.exists(), time.perf_counter()
    run_search(search, path, resume=True)
    seconds = time.perf_counter() - start if fresh else float("nan")
    noted.write_text(repr(seconds))
    return seconds


def tested(trial: Path) -> dict[str, float]:
    """Test means of a trial's best policy, by metric."""
    file = trial / "tested.json"
    if not file.is_file():
        metrics, _ = evaluate(config_for(str(trial), None, []), "test", print)
        write_text(file, json.dumps({name: found["mean"] for name, found in metrics.items()}))
    return dict(json.loads(file.read_text()))


def utilities(folder: Path, names: Sequence[str]) -> dict[str, float]:
    """By trial: the utility of its best policy's test means, with the search's weights and spreads of the base policy.

    Of means, so that what a search clips a prompt is not clipped here.
    """
    config = RunFiles(folder / "base").config
    weights = config.evaluation.utility or {}
    base = json.loads(next((folder / "base" / "checkpoints").glob("step-*/state.json")).read_text())["utility"]["base"]
    found = {name: tested(folder / "trials" / name) for name in names}
    return {
        trial: sum(weight * (metrics[name] - base[name][0]) / base[name][1] for name, weight in weights.items())
        for trial, metrics in found.items()
    }


def seed_spread(given: argparse.Namespace) -> float:
    """Standard deviation of the test utility of the first point, which is equal weights, over three training seeds."""
    once = ["scheduler=none", "trials=1", "finalists=1", "seeds=3"]
    search, path = load_search(given.file, [*ALONE, *given.overrides, *once]), given.output / "seeds"
    run_search(search, path, resume=True)
    names = [entry.name for entry in course_of(search, Ledger(path / "decisions.jsonl")).of("finalist")]
    return statistics.stdev(utilities(path, names).values())


def replay(course: Course, runs: dict[str, list[Report]], slots: int = SLOTS) -> Course:
    """Feed a course the reports of complete runs, as `slots` workers would bring them: by the runs' own seconds."""
    clock, busy = 0.0, dict[str, float]()
    while not course.over:
        for entry in course.going:
            if entry.name not in busy and len(busy) < slots:
                reports, done = runs[entry.name], len(entry.reports)
                busy[entry.name] = clock + reports[done].seconds - (reports[done - 1].seconds if done else 0.0)
        name = min(busy, key=lambda name: (busy[name], name))
        clock = busy.pop(name)
        course.report(name, runs[name][len(course.entries[name].reports)])
    return course


def tokens(course: Course) -> int:
    return sum(entry.reports[-1].tokens for entry in course.of("trial"))


def choice(course: Course) -> str:
    """The trial that a search hands on: the best by tune utility of those that came to the end."""
    done = [entry for entry in course.of("trial") if entry.state == "done"]
    return max(done, key=lambda entry: float(np.nanmean(entry.utility))).name


def without_stopping(course: Course, test: dict[str, float], budget: float) -> float:
    """Mean test utility of random search that trains to the end on as many tokens.

    Over all sets of trials of the size that the budget pays for, on the average; between two sizes in proportion, which
    is what a search of another size now and then would come to.
    """
    trials = course.of("trial")
    size = budget / (tokens(course) / len(trials))
    tune = {entry.name: float(np.nanmean(entry.utility)) for entry in trials}

    def mean(count: int) -> float:
        sets = itertools.combinations(tune, max(count, 1))
        return statistics.mean(test[max(some, key=tune.__getitem__)] for some in sets)

    low = int(size)
    return mean(low) + (size - low) * (mean(low + 1) - mean(low))


def lines_of(course: Course) -> list[dict[str, object]]:
    """What was decided on what, without the seconds: in the order of trials, since that of their arrival is chance."""
    kept = [{key: value for key, value in line.items() if key != "seconds"} for line in course.ledger.lines]
    return sorted(kept, key=lambda line: json.dumps(line, sort_keys=True))


def print_row(
    seed: int, whole: int, best: float, spread: float, name: str, spent: int, ends: str, chosen: str, utility: float
) -> float:
    """Print a row of the table; returns the regret, in the range of the runs."""
    regret = (best - utility) / spread
    cells = (name, f"{spent:,}", f"{spent / whole:.1%}", ends, chosen, f"{utility:.3f}", f"{regret:.1%}")
    print(f"| {seed} | {' | '.join(cells)} |", flush=True)
    return regret


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/search_cost"))
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    shares: dict[str, list[float]] = {name: [] for name in SCHEDULERS}
    regrets: dict[str, list[float]] = {name: [] for name in SCHEDULERS}
    random: list[float] = []
    ranges: list[float] = []
    print("| seed | scheduler | tokens | of all | trials to the end | choice | test utility | regret, of the range |")
    print("|---" * 8 + "|")
    for seed in range(given.seeds):
        whole, seconds = complete(seed, given)
        folder = given.output / f"complete-{seed}"
        test = utilities(folder, [entry.name for entry in whole.of("trial")])
        runs = {entry.name: entry.reports for entry in whole.of("trial")}
        best, spread = max(test.values()), max(test.values()) - min(test.values())
        ranges.append(spread)

        row = partial(print_row, seed, tokens(whole), best, spread)
        row("none", tokens(whole), f"{len(runs)}", choice(whole), test[choice(whole)])
        for name in SCHEDULERS:
            course = replay(course_of(settings(seed, name, given), Ledger()), runs)
            ends = sum(entry.state == "done" for entry in course.of("trial"))
            regrets[name].append(row(name, tokens(course), str(ends), choice(course), test[choice(course)]))
            shares[name].append(tokens(course) / tokens(whole))
            if name == "halving":
                utility = without_stopping(whole, test, tokens(course))
                random.append(row("none, as many tokens", tokens(course), "-", "-", utility))
                if seed == 0:
                    live(course, seconds, given)
    for name in SCHEDULERS:
        print(
            f"{name}: {statistics.mean(shares[name]):.1%} of the tokens of all trials to the end; regret "
            f"{statistics.mean(regrets[name]):.1%} of the range on the average, {max(regrets[name]):.1%} at most"
        )
    print(f"random search without stopping on the tokens of halving: regret {statistics.mean(random):.1%}")
    noise = seed_spread(given)
    print(f"spread of the first point from seed to seed: {noise / statistics.mean(ranges):.1%} of the range")


def live(course: Course, complete_s: float, given: argparse.Namespace) -> None:
    """Run the search for real, and set it against its replay."""
    search, path = settings(0, "halving", given), given.output / "live-0"
    seconds = timed(search, path)
    same = lines_of(course_of(search, Ledger(path / "decisions.jsonl"))) == lines_of(course)
    print(f"live halving: {'every decision and number as' if same else 'NOT'} replayed; ", end="")
    print(f"{seconds:.0f} s against {complete_s:.0f} s of all trials to the end, ratio {seconds / complete_s:.1%}")


if __name__ == "__main__":
    main()
