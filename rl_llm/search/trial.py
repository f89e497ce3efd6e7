"""A trial of a search as Ray Tune has it. What it does is in `rl_llm.search.slot`."""

import json
import os
import pickle
from typing import Any

import ray
from ray import tune


class Trial(tune.Trainable):
    """A trial in its slot: one Tune step trains up to the next evaluation.

    Its config is {"assignment": JSON of an `Assignment`}. Other trials take its place in the same process; each begins
    when it is first asked for a step, since Tune may make a process for one that is over by then.
    """

    def setup(self, config: dict[str, Any], places: list[str], shared: bytes) -> None:
        """`places`: where modules of the user's lie; `shared`: a pickled `Shared`, which may need them."""
        # Before torch is loaded: threads that wait spinning slow down other trials.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        from rl_llm.runtime.actor import prepare_process

        prepare_process(places)
        from rl_llm.search.slot import Slot

        self._slot = Slot(pickle.loads(shared), ray.util.get_current_placement_group())
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._new: str | None = new_config["assignment"]
        return True

    def step(self) -> dict[str, Any]:
        """See `Slot.advance`."""
        new, self._new = self._new, None
        return self._slot.advance(None if new is None else json.loads(new))

    def cleanup(self) -> None:
        self._slot.close()
