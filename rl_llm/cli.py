"""The commands. Each reads its arguments, calls one function and prints what it gives."""

import io
import logging
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from rl_llm.errors import Interrupted, RunFailed, UserError, on_the_command_line
from rl_llm.files import room_for
from rl_llm.process import absolute
from rl_llm.runs.console import terminal
from rl_llm.runs.output import shielded

app = typer.Typer(
    help="Reinforcement learning of language models with mixtures of rewards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
rewards_app = typer.Typer(help="Look at reward components and try them.", no_args_is_help=True)
app.add_typer(rewards_app, name="rewards")

Overrides = Annotated[
    list[str] | None, typer.Argument(help="settings such as learner.lr=1e-5", metavar="[KEY=VALUE]...")
]


@app.command()
@shielded()
def train(
    source: Annotated[str, typer.Argument(help="a packaged recipe or a YAML file", metavar="RECIPE|FILE")],
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="run directory; default: runs/<recipe>-<time>")] = None,
    resume: Annotated[bool, typer.Option(help="go on from the newest checkpoint in --output")] = False,
    dry_run: Annotated[
        bool, typer.Option(help="check everything, print the config and the plan, start nothing")
    ] = False,
) -> None:
    """Train a policy: warm start where asked, reinforcement learning, controls, report."""
    from rl_llm.config import load_config

    config = load_config(source, overrides or [])
    if resume and output is None:
        raise UserError("--resume needs --output, the directory of the run to go on with")
    if dry_run:
        from rl_llm.launch.preflight import describe, make_plan, refuse_unwritable
        from rl_llm.launch.resume import find_checkpoint
        from rl_llm.runs.directory import refuse_held
        from rl_llm.runs.trackers import sinks
        from rl_llm.tasks import describe_bad_rows

        sinks(config.logging)
        plan = make_plan(config, {})
        if output is None:
            refuse_unwritable(Path("runs").absolute(), "name an --output")
        else:
            refuse_held(absolute(output))
            find_checkpoint(plan, absolute(output), resume)
        print(config.to_yaml())
        print("\n".join(describe(plan)))
        if plan.task.bad_rows:
            print(describe_bad_rows(plan.task.bad_rows))
        return
    from rl_llm.launch.training import run_training
    from rl_llm.runs.directory import run_directory

    with run_directory(output, f"{Path(source).stem}-") as path, _to_go_on(["train", source, *(overrides or [])], path):
        run = run_training(config, path, resume=resume)
    terminal().print(run.table())
    print(f"run {run.path}  model {run.model}  report {run.path / 'report.html'}")


@app.command()
@shielded()
def search(
    source: Annotated[str, typer.Argument(help="a YAML file such as those of tune_configs/", metavar="FILE")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="settings such as trials=4 or run.trainer.steps=90", metavar="[KEY=VALUE]..."),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="the search's directory; default: runs/<file>-<time>")] = None,
    resume: Annotated[bool, typer.Option(help="go on with the search in --output")] = False,
    dry_run: Annotated[
        bool, typer.Option(help="check everything, print what would be searched, start nothing")
    ] = False,
) -> None:
    """Search which weights, or any other settings, give the best policy: trials, early stopping, finalists."""
    from rl_llm.search.config import load_search

    config = load_search(source, overrides or [])
    if resume and output is None:
        raise UserError("--resume needs --output, the directory of the search to go on with")
    from rl_llm.runs.directory import run_directory
    from rl_llm.search.launching import dry_search, run_search

    if dry_run:
        print("\n".join(dry_search(config, output, resume)))
        return
    with (
        run_directory(output, f"{Path(source).stem}-") as path,
        _to_go_on(["search", source, *(overrides or [])], path),
    ):
        found = run_search(config, path, resume=resume)
    terminal().print(found.table())
    print(f"{found.headline}\n{found.cost}\nsearch {found.path}  report {found.path / 'report.html'}")


@app.command()
@shielded()
def forecast(
    source: Annotated[
        str, typer.Argument(help="a packaged recipe, a YAML file or a run directory", metavar="RECIPE|FILE|RUN")
    ],
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(help="completions a tune prompt")] = 64,
    kl: Annotated[
        float | None, typer.Option(help="nats a completion at which weightings are compared; default: 1 at most")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="directory; default: the run's own, or runs/forecast-<recipe>-<time>")
    ] = None,
) -> None:
    """Say before any training what each weighting of the rewards would come to, from the base policy's samples."""
    from rl_llm.config import build_config
    from rl_llm.runs.directory import run_directory
    from rl_llm.search.forecasting import run_forecast, settings_of

    raw, run = settings_of(source)
    config = build_config(raw, overrides or [], where=source)
    with run_directory(output or run, f"forecast-{Path(source).stem}-") as path:
        found = run_forecast(config, path, _note, samples=samples, kl=kl)
    out = terminal()
    out.print(found) if out.is_terminal else print(found)
    print(f"forecast {path / 'forecast.json'}  samples {path / 'forecast.parquet'}  report {path / 'forecast.html'}")


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="a run directory or a model", metavar="MODEL|RUN")],
    overrides: Overrides = None,
    config: Annotated[
        str | None, typer.Option(help="recipe or YAML file with task and rewards, for a plain model")
    ] = None,
    split: Annotated[str, typer.Option(help="train, tune or test")] = "test",
) -> None:
    """Measure a policy on held-out prompts, with 95 % intervals."""
    from rl_llm.launch.inference import config_for
    from rl_llm.launch.inference import evaluate as run_evaluation
    from rl_llm.runs.results import ResultTable

    if config is None and not (Path(model) / "config.yaml").is_file():
        raise UserError(
            f"{model} is no run, so evaluate needs --config: a recipe or YAML file with its task and rewards"
        )
    metrics, count = run_evaluation(config_for(model, config, overrides or []), split, _note)
    (titles, *rows) = ResultTable({"mean [95 % interval]": metrics}).cells()
    _show(titles, rows)
    print(f"{count} prompts of the {split} split")


@app.command()
def predict(
    model: Annotated[str, typer.Argument(help="a run directory or a model", metavar="MODEL|RUN")],
    file: Annotated[str, typer.Argument(help="JSONL, CSV or Parquet with the columns of the prompt template")],
    overrides: Overrides = None,
    output: Annotated[Path | None, typer.Option(help="JSON lines; default: print them")] = None,
) -> None:
    """Write a completion for each row of a file."""
    from rl_llm.launch.inference import config_for, write_jsonl
    from rl_llm.launch.inference import predict as run_prediction

    rows = run_prediction(config_for(model, None, overrides or []), file, _note)
    with _writing(output) as out:
        count = write_jsonl(rows, out)
    if output:
        print(f"{count} completions in {output}")


@app.command()
def replay(
    run: Annotated[Path, typer.Argument(help="a run directory")],
    weights: Annotated[str, typer.Option(help="other weights, such as chrf=1,length=0.2")],
) -> None:
    """Weigh a run's stored rollouts anew: whose advantage would have changed sign, what would have been preferred."""
    from rl_llm.runs.replay import replay as run_replay

    terminal().print(run_replay(run, _weights(weights)))


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="of a run or a search", metavar="DIR")]) -> None:
    """Write report.html, one file that works offline; of a search also front.svg, trials.parquet and pareto.json."""
    from rl_llm.runs.run import Run
    from rl_llm.search.reader import is_search

    if is_search(directory):
        from rl_llm.search.search import Search

        print(Search(directory).report())
    else:
        print(Run(directory).report())


@app.command()
def pick(
    search: Annotated[Path, typer.Argument(help="the directory of a search", metavar="DIR")],
    pairs: Annotated[int, typer.Option(help="pairs to choose from, a third of them on the test split", min=1)] = 45,
) -> None:
    """Find a utility by looking: blind pairs of answers from the models of a search's front."""
    from rl_llm.search.pick import pick as run_pick

    run_pick(search, pairs, _note)


@rewards_app.command("list")
def list_rewards() -> None:
    """Every component a config can name, with its range, arguments and the columns it needs."""
    from rl_llm.rewards import known

    rows = []
    for name, entry in known().items():
        low, high = entry.range
        arguments = "\n".join(f"{key}={value}" for key, value in entry.arguments.items())
        rows.append([name, f"{low:g} to {high:g}", ", ".join(entry.columns), arguments, entry.summary])
    _show(["component", "range", "columns", "arguments", "what it is"], rows)


@rewards_app.command("score")
def score_file(
    file: Annotated[str, typer.Argument(help="JSONL, CSV or Parquet with completions")],
    overrides: Overrides = None,
    use: Annotated[
        list[str] | None, typer.Option(help="a component or package.module:function; may be repeated")
    ] = None,
    config: Annotated[str | None, typer.Option(help="recipe or YAML file whose components score")] = None,
    completion: Annotated[str, typer.Option(help="the column with completions")] = "completion",
    output: Annotated[Path | None, typer.Option(help="JSON lines with each row's values")] = None,
) -> None:
    """Score completions of a file: try a reward before training on it."""
    from rl_llm.config import build_config, read_config
    from rl_llm.launch.inference import NO_MODEL, score, summarise, with_scores, write_jsonl

    if bool(use) == bool(config):
        raise UserError("give the components with --use (repeated), or with --config")
    raw: dict[str, Any] = read_config(config) if config else {"rewards": {"components": use}}
    policy = raw.get("policy")
    model = (policy.get("model") if isinstance(policy, dict) else None) or NO_MODEL
    settings = build_config({**raw, "policy": {"model": model}}, overrides or [], where=config or "--use")
    rows, scores = score(settings, file, completion, _note)
    if output:
        with _writing(output) as out:
            print(f"{write_jsonl(with_scores(rows, scores, _note), out)} rows in {output}")
    _show(["component", "mean", "std", "not applicable", "failed", "ms a row"], summarise(scores))
    for name, found in scores.items():
        for message in found.errors:
            print(f"{name}: {message}")


def _show(titles: list[str], rows: Iterable[list[str]]) -> None:
    table = Table()
    for title in titles:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    terminal().print(table)


def _note(text: str) -> None:
    print(text, file=sys.stderr)


@contextmanager
def _writing(path: Path | None) -> Iterator[IO[str]]:
    """The file to write to, or standard output. Raises `UserError` where it cannot be made."""
    if path is None:
        if sys.stdout is None:
            raise UserError("standard output is closed; name a file with --output")
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # as JSON lines in a file
        with room_for("standard output", then="do it again"):
            yield sys.stdout
            sys.stdout.flush()
        return
    try:
        there = absolute(path)
        there.parent.mkdir(parents=True, exist_ok=True)
        file = there.open("w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {path}: {error.strerror}; name another file") from None
    with room_for(path, then="do it again"), file:
        yield file


@contextmanager
def _to_go_on(command: list[str], path: Path) -> Iterator[None]:
    """Where it is asked to stop, before its first step too, says with which command it goes on."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        resumed = shlex.join(["rl-llm", *command, "--output", str(path), "--resume"])
        how = stopped if isinstance(stopped, Interrupted) else "stopped at once"
        print(f"{how} in {path}; go on with: {resumed}")
        raise typer.Exit(130) from None


def _weights(text: str) -> dict[str, float]:
    weights = {}
    for part in text.split(","):
        name, sep, value = part.partition("=")
        try:
            weights[name.strip()] = float(value)
        except ValueError:
            sep = ""
        if not sep:
            raise UserError(f"--weights {text!r}: write it as name=number,name=number")
    return weights


def main() -> None:
    """Run a command; what the user can mend is one or two lines and exit code 2."""
    # A closed stream's number goes to the next file, which would then get what libraries print.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with shielded("stderr"):
        _run()


def _run() -> None:
    logging.basicConfig(format="%(message)s")
    # Threads that wait spinning slow each other down many times as soon as processes share cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Without a network the Hub's client would announce each of its tries.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not terminal().is_terminal:
        app.rich_markup_mode = None  # typer's own output believes FORCE_COLOR
    try:
        with on_the_command_line():
            app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
