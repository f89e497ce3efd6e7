"""A forecast in words and as a table, from its forecast.json: for the terminal, the report and a notebook."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import rich.table
from rich.text import Text

from rl_llm.config import UTILITY
from rl_llm.runs.results import html_of, interval_text
from rl_llm.runs.text import aligned, printable

FORECAST = "forecast.json"
OUT_OF_REACH = "short of the KL"
OTHERS = 6  # weightings without a name that a table shows
RARE = 0.1  # of prompts: a component whose samples differ in fewer is worth a word

LIMITS = (
    "It says nothing of behaviour that the base policy never sampled, such as a way to cheat a reward, of other "
    "prompts than these, or of runs that go further from the base than this KL."
)


@dataclass(frozen=True)
class ForecastText:
    """A forecast, as `Forecast.to_dict` gives it, for people."""

    data: Mapping[str, Any]

    @property
    def metrics(self) -> list[str]:
        """The utility first, then what it weighs, then the others."""
        judged = self.data["metrics"]
        return sorted(self.data["base"], key=lambda name: (name != UTILITY, name not in judged))

    def rows(self) -> list[tuple[str, Mapping[str, Any], str]]:
        """What a table shows: name, metrics with their intervals and verdict of the base, of weightings with a name, of
        the best one, and of others that are not dominated, the best utility first."""
        points = self.data["points"]
        named = [(self._name(point), point["metrics"], _remark(point)) for point in points if point["name"]]
        best = (self.data["best"] or {}).get("weights")
        chosen = [point for point in points if point["weights"] == best and not point["name"]]
        rest = [point for point in points if not point["name"] and point not in chosen and point["verdict"] == "front"]
        if self.data["utility"]:
            rest.sort(key=lambda point: -(point["metrics"][UTILITY]["mean"] or 0.0))
        shown = [*chosen, *_spread(rest, OTHERS - len(chosen))]
        others = [(self._name(point), point["metrics"], _remark(point, point["weights"] == best)) for point in shown]
        return [("base policy", self.data["base"], "KL 0"), *named, *others]

    def _name(self, point: Mapping[str, Any]) -> str:
        if point["name"] in ("", "configured"):
            weights = weights_text(point["weights"])
            return f"configured: {weights}" if point["name"] else weights
        return str(point["name"])

    def sentences(self) -> list[str]:
        """What the forecast says, what it rests on, and what it does not say; a point each."""
        return [*self._basis(), *self._best(), *self._fights(), *self._signal(), LIMITS]

    def _basis(self) -> list[str]:
        data = self.data
        compared = [point for point in data["points"] if point["verdict"] != OUT_OF_REACH]
        told = (
            f"From {data['prompts']} tune prompts x {data['samples']} samples of the base policy: "
            f"{len(data['points'])} weightings of {', '.join(data['members'])}, compared at a mean KL of "
            f"{data['kl']:.2f} nats a completion"
        )
        if compared:
            sizes = [point["ess"] for point in compared]
            told += f", where {min(sizes):.0f} to {max(sizes):.0f} of {data['samples']} samples still count"
        out = [f"{told}."]
        if data["kl"] < data["asked"] - 1e-9:
            out.append(
                f"Asked was {data['asked']:.2f}: where many samples tie, some weightings cannot come further from the "
                "base."
            )
        short = [self._name(point) for point in data["points"] if point["verdict"] == OUT_OF_REACH]
        if short:
            more = f" and {len(short) - 3} more" if len(short) > 3 else ""
            out.append(f"Too little signal to come near that KL, and compared with none: {'; '.join(short[:3])}{more}.")
        return out

    def _best(self) -> list[str]:
        best = self.data["best"]
        if best is None:
            if self.data["utility"]:
                return ["No weighting has enough signal to be compared."]
            return ["There is no utility (evaluation.utility), so the front is unranked."]
        halves = " and ".join(f"({weights_text(weights)})" for weights in best["halves"])
        over = "; ".join(f"{interval_text(lead)} over {_ORDINARY[name]}" for name, lead in best["over"].items())
        out = [
            f"Best utility: {weights_text(best['weights'])}. Chosen on either half of the prompts, {halves}, and read "
            f"on the other it comes to {interval_text(best['utility'])}: {over}."
        ]
        if best["ties"] > 1:
            out.append(f"{best['ties']} weightings cannot be told apart from the best, itself among them.")
        return out

    def _fights(self) -> list[str]:
        found = {(fight["component"], fight["metric"]): fight["change"] for fight in self.data["fights"]}
        out = []
        for (one, other), change in found.items():
            told = f"following {one} alone moves {other} by {interval_text(change)}"
            if (other, one) not in found:
                out.append(f"{told[0].upper()}{told[1:]}, for the worse.")
            elif self.data["members"].index(one) < self.data["members"].index(other):
                back = interval_text(found[other, one])
                out.append(f"{one} and {other} fight: {told}, and the other way round {one} by {back}.")
        return out or ["No component alone makes another metric worse beyond the interval."]

    def _signal(self) -> list[str]:
        out = []
        for name, share in self.data["signal"].items():
            if share == 0:
                out.append(f"{name} carries no signal: as the mixture sees it, no two samples of a prompt differ.")
            elif share < RARE:
                out.append(f"{name} carries little signal: its samples differ in {share:.0%} of the prompts.")
        return out

    def __str__(self) -> str:
        titles = ["weighting", *self.metrics, "note"]
        cells = [[name, *self._cells(metrics), note] for name, metrics, note in self.rows()]
        return printable("\n".join([*aligned([titles, *cells]), "", *self.sentences()]))

    def _cells(self, metrics: Mapping[str, Any]) -> list[str]:
        return [interval_text(metrics.get(name)) for name in self.metrics]

    def __rich__(self) -> rich.console.Group:
        table = rich.table.Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for title in ("weighting", *self.metrics, "note"):
            table.add_column(title, overflow="fold")
        for name, metrics, note in self.rows():
            stacked = [cell.replace(" ", "\n", 1) for cell in self._cells(metrics)]
            table.add_row(*(Text(printable(cell)) for cell in (name, *stacked, note)))
        told = [Text(f"- {printable(sentence)}") for sentence in self.sentences()]
        return rich.console.Group(table, Text(), *told)

    def _repr_html_(self) -> str:
        return html_of(self, width=60 + 20 * len(self.metrics))


_ORDINARY = {"base": "the base policy", "equal": "equal weights", "configured": "the configured ones"}


def weights_text(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {weight:.2g}" for name, weight in weights.items())


def _remark(point: Mapping[str, Any], best: bool = False) -> str:
    said = "best utility" if best else "" if point["verdict"] == "front" else point["verdict"]
    return f"{said}, ESS {point['ess']:.0f}" if said else f"ESS {point['ess']:.0f}"


def _spread(points: list[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """Some of many points in their order, evenly."""
    step = max(len(points) / max(count, 1), 1.0)
    return [points[int(k * step)] for k in range(min(count, len(points)))]
