"""The solver of a name."""

from wan21.config import SOLVERS, one_of
from wan21.samplers.dpmpp import DPMSolverPP
from wan21.samplers.sampler import Sampler
from wan21.samplers.unipc import UniPC


def make_sampler(solver: str, *, num_steps: int, shift: float) -> Sampler:
    """A fresh solver for one run.

    Args:
        solver: "unipc" or "dpm++".
        num_steps: number of calls of the model.
        shift: how far the noise levels are pushed towards noise.

    Raises:
        UsageError: an unknown solver, no steps, or a shift that leaves no room between noise levels.
    """
    one_of("sample_solver", solver, SOLVERS)
    kinds = {"unipc": UniPC, "dpm++": DPMSolverPP}
    return kinds[solver](num_steps=num_steps, shift=shift)
