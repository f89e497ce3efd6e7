"""Models of a front as folders, those of trials that were stopped early too."""

from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors.torch import load_file

from rl_llm.config import RunConfig
from rl_llm.launch.preflight import quiet_libraries
from rl_llm.policies import load_policy
from rl_llm.runs import checkpoint
from rl_llm.search.front import Candidate
from rl_llm.search.reader import SearchFiles


def export_models(files: SearchFiles, points: Sequence[Candidate], base: str, note: Callable[[str], None]) -> None:
    """Leave `model/` in the run directory of each point that has none; says where the weights are gone.

    Args:
        base: folder or Hub name of the policy that all trials began with.
    """
    quiet_libraries()
    for point in points:
        if point.model is not None:
            continue
        folder = files.folder(point.name)
        weights = weights_of(folder, point.step)
        if weights is None:
            note(f"{point.name}: its weights of step {point.step} are gone, so it has no model/")
            continue
        export_model(files.run(point.name).config, base, weights, folder / "model")


def weights_of(run: Path, step: int) -> Path | None:
    """The weights that a run had after a step, as its best ones or in a checkpoint; None where they are not kept."""
    for kept in (run / "checkpoints" / "best", run / "checkpoints"):
        folder = kept / checkpoint.step_name(step)
        if checkpoint.damage(folder) is None:
            return folder / "weights.safetensors"
    return None


def export_model(config: RunConfig, base: str, weights: Path, folder: Path) -> None:
    """Leave a folder that `transformers` loads: the base with these weights of a learner in place.

    Raises:
        UserError: the base cannot be loaded.
    """
    policy = load_policy(base, config.policy)
    policy.load_named(load_file(weights, device=str(policy.device)).items())
    with checkpoint.writing(folder) as aside:
        policy.save_pretrained(aside)
