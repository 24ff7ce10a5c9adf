"""The errors of the runner.

WanError (wan21)        exit code 1
  UsageError (wan21)    exit code 2  a knob's value, or a combination of values, that cannot be
SweepError              exit code 1
  FolderError           exit code 2  a folder that cannot be made or written, or that is there already
  RecordError           exit code 1  a record that cannot be read

A message states the value, the rule and the way out. How a job ends is never an error: it is an outcome.
"""

from wan21.errors import UsageError

__all__ = ["FolderError", "RecordError", "SweepError", "UsageError"]


class SweepError(Exception):
    """Root of the runner's own tree."""

    exit_code = 1


class FolderError(SweepError):
    """A sweep has no folder to write to."""

    exit_code = 2


class RecordError(SweepError):
    """A record is damaged, or of a schema that this version does not know."""
