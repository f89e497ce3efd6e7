"""What varies in a search: points, and where they come from."""

from typing import Any

Point = dict[str, Any]
"""A value by dotted path of a run's setting; of a simplex the weights of its members, by name."""
