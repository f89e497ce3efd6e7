"""Where prompts and references come from: files, Hub data sets, rows in memory and a built-in generator."""

from rl_llm.tasks.files import BadRow, describe_bad_rows
from rl_llm.tasks.task import SPLITS, Task, load_prompts, load_task, task_from_rows

__all__ = ["SPLITS", "BadRow", "Task", "describe_bad_rows", "load_prompts", "load_task", "task_from_rows"]
