"""Runs made for comparison."""

from rl_llm.config import RunConfig, build_config


def constant_reward(config: RunConfig, utility: dict[str, float]) -> RunConfig:
    """The same run with nothing to learn from: a constant reward, measured by the same metrics and utility."""
    measured = {name: component.model_copy(update={"gate": None}) for name, component in config.measured.items()}
    raw = config.to_dict()
    raw["rewards"] |= {"components": {"constant_control": {"use": "constant"}}, "weights": {}}
    raw["evaluation"] |= {
        "metrics": {name: component.model_dump(mode="json") for name, component in measured.items()},
        "utility": utility,
        "controls": [],
        "patience": None,
        "every": config.trainer.steps,
    }
    raw["checkpoint"]["every"] = config.trainer.steps
    # No group will ever have signal: drawing others would only take longer.
    raw["algorithm"]["resample"] = 0
    raw["logging"] |= {"rollouts": 0, "tensorboard": False, "wandb_project": None, "mlflow_experiment": None}
    return build_config(raw)
