"""The one exception that the command line tells apart."""

from __future__ import annotations


class UsageError(ValueError):
    """The request itself is wrong, whatever the model and the data: exit code 2."""
