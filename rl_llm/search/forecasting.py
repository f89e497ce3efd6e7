"""A forecast from a config: checks, warm start, samples, numbers, files. What the command and the API call."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rl_llm.config import RunConfig, read_config
from rl_llm.errors import UserError, option
from rl_llm.files import room_for, write_text
from rl_llm.launch.alone import one_at_a_time
from rl_llm.launch.preflight import make_plan, refuse_unwritable
from rl_llm.launch.record import Note, prepare_base, reporting
from rl_llm.process import absolute, own_modes
from rl_llm.runs.forecasts import FORECAST
from rl_llm.runs.report.html import write_forecast
from rl_llm.runs.run import Run
from rl_llm.runtime import connected
from rl_llm.search.forecast import Forecast, check_kl, forecast
from rl_llm.search.samples import check_prompts
from rl_llm.search.sampling import read_samples, sample_base, samples_of, write_samples
from rl_llm.tasks import Task
from rl_llm.trainer.state import utility_weights
from rl_llm.values import to_json

SAMPLES = 64
TABLE = "forecast.parquet"


def settings_of(source: str | Path) -> tuple[dict[str, Any], Path | None]:
    """The plain settings of a recipe, YAML file or run directory, and that directory.

    Raises `UserError` where there is none.
    """
    path = Path(source)
    if (path / "config.yaml").is_file():
        return Run(path).config.to_dict(), path
    if path.is_dir():
        raise UserError(f"{path} is no run directory (no config.yaml in it); give a run, a YAML file or a recipe")
    return read_config(source), None


@one_at_a_time
@own_modes()
def run_forecast(
    config: RunConfig,
    path: Path,
    note: Note,
    *,
    samples: int = SAMPLES,
    kl: float | None = None,
    functions: Mapping[str, Callable[..., Any]] | None = None,
    task: Task | None = None,
) -> Forecast:
    """Forecast the mixture of a config and leave forecast.parquet, .json and .html in a directory.

    Samples that are there already serve again where the same ones would be drawn: weights, gates, clips and the
    algorithm may be others. A run directory's own files are left alone, but its report gets a section on the forecast.

    Args:
        path: the directory, made where there is none.
        note: is told of progress.
        samples: a prompt.
        kl: nats a completion at which weightings are compared; see `default_kl`.
        functions: reward functions given as they are, by component.
        task: prompts made already, in place of `config.task`.

    Raises:
        UserError: something has to be changed first; nothing was sampled.
        RunFailed: a reward failed beyond what its configuration allows.
    """
    path = absolute(path)
    check_kl(samples, kl)
    plan = make_plan(config, functions or {}, task)
    check_prompts(min(plan.task.splits["tune"].num_rows, config.evaluation.prompts))
    if path.exists() and not path.is_dir():
        raise UserError(f"{option('output')} {path} is a file; name a directory")
    refuse_unwritable(path, f"name another {option('output')}")
    with room_for(path, then="do it again"):
        path.mkdir(parents=True, exist_ok=True)
        table = read_samples(path / TABLE, plan, samples)
        if table is None:
            with connected(config.resources):
                base = prepare_base(plan, path, None, note)
                table = sample_base(plan, base, samples, note)
            write_samples(table, path / TABLE)
        else:
            note(f"forecast: the samples in {path / TABLE} serve again")
        found = forecast(samples_of(table), config, utility=utility_weights(config), kl=kl)
        write_text(path / FORECAST, to_json(found.to_dict()) + "\n")
        write_forecast(path)
        if (path / "config.yaml").is_file():
            # Now with the forecast; a run that is just writing its files is not to be in the way.
            with reporting(path, note, "new report.html"):
                Run(path).report()
    return found
