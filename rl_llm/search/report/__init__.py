"""The HTML report of a search, and its picture."""
