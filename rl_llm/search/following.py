"""Who follows a search."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rl_llm.runs.writer import write_summary
from rl_llm.search.course import OVER, Course
from rl_llm.search.reader import TRIALS


class Follower:
    """Base class for whatever wants to follow a search; override what you need, the rest does nothing."""

    def on_start(self, course: Course, path: Path) -> None:
        """Before the first trial; of a resumed search the course is where it was."""

    def on_line(self, course: Course, line: dict[str, Any]) -> None:
        """After each line of decisions.jsonl: somebody is asked, has reported or failed, goes on, is cut or told."""

    def on_message(self, text: str) -> None:
        """A line about the search for whoever watches it."""

    def on_end(self, course: Course, summary: dict[str, Any]) -> None:
        """However the search ended."""


class Followers:
    """Tells every line of a course's ledger to all who follow, once."""

    def __init__(self, members: Sequence[Follower], path: Path) -> None:
        self.members, self.path = members, path
        self._told = 0

    def start(self, course: Course) -> None:
        """Lines of an earlier start are no news."""
        self._course = course
        for member in self.members:
            member.on_start(course, self.path)
        self.look()

    def began_with(self, lines: int) -> None:
        self._told = lines

    def message(self, text: str) -> None:
        for member in self.members:
            member.on_message(text)

    def look(self, *_: str) -> None:
        """Tell what is new."""
        lines = self._course.ledger.lines
        while self._told < len(lines):
            self._told += 1
            for member in self.members:
                member.on_line(self._course, lines[self._told - 1])

    def end(self, summary: dict[str, Any]) -> None:
        for member in self.members:
            member.on_end(self._course, summary)


class Endings(Follower):
    """Writes the summary of trials that were cut, ended from outside or have failed; others write their own."""

    def on_start(self, course: Course, path: Path) -> None:
        self._path, self._written = path, set[str]()
        self._write(course)

    def on_line(self, course: Course, line: dict[str, Any]) -> None:
        self._write(course)

    def _write(self, course: Course) -> None:
        for entry in course.entries.values():
            own = entry.state == "done" and entry.reports[-1].ended
            if entry.state in OVER and not own and entry.name not in self._written:
                self._written.add(entry.name)
                folder, best = self._path / TRIALS / entry.name, entry.best
                folder.mkdir(parents=True, exist_ok=True)
                status = "stopped_early" if entry.state == "done" else entry.state
                summary: dict[str, Any] = {"status": status, "reason": entry.reason, "controls": {}}
                summary["steps"] = entry.reports[-1].step if entry.reports else 0
                summary["best_step"] = 0 if best is None else best.step
                summary["seconds"] = entry.reports[-1].seconds if entry.reports else 0.0
                write_summary(folder, summary)
