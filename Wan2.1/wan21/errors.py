"""The errors a caller of wan21 can meet.

WanError                exit code 1
  UsageError            exit code 2  a value that the caller gave; also a ValueError
    VaeBudgetError      exit code 2  a budget that no tile of the VAE fits into
  CheckpointError       exit code 3  a file of weights that is missing, damaged or of another shape; also a ValueError
  MissingPackageError   exit code 4  an optional package that a choice needs; also an ImportError

A message states the value, the rule and the way out.
"""


class WanError(Exception):
    """Root of the tree."""

    exit_code = 1


class UsageError(WanError, ValueError):
    """A value that cannot be, or a combination that cannot be."""

    exit_code = 2


class VaeBudgetError(UsageError):
    """The VAE's budget is too small for the picture; a larger one, or a smaller number format, may do.

    Attributes:
        least_gib: the smallest budget that works in this number format.
    """

    def __init__(self, message: str, least_gib: float) -> None:
        super().__init__(message)
        self.least_gib = least_gib


class CheckpointError(WanError, ValueError):
    """A checkpoint folder, file or tensor that is not what the model needs."""

    exit_code = 3


class MissingPackageError(WanError, ImportError):
    """A choice needs a package that is not installed; the message names the extra."""

    exit_code = 4


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuses a value that is not among the allowed ones.

    Raises:
        UsageError: names the value and what is allowed.
    """
    if value not in allowed:
        raise UsageError(f"{name}={value} is not known; choose {', '.join(allowed)}")
