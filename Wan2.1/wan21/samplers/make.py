"""The solver of a name."""

import torch

from wan21.errors import one_of
from wan21.request import SOLVERS
from wan21.samplers.dpmpp import DPMSolverPP
from wan21.samplers.sampler import Sampler
from wan21.samplers.unipc import UniPC


def make_sampler(solver: str, *, num_steps: int, shift: float, rounds_products: bool = False) -> Sampler:
    """A fresh solver for one run.

    Args:
        solver: "unipc" or "dpm++".
        num_steps: number of calls of the model.
        shift: how far the noise levels are pushed towards noise.
        rounds_products: UniPC forms two products in bfloat16, as upstream's does by accident; DPM++ has none such.

    Raises:
        UsageError: an unknown solver, no steps, or a shift that leaves no room between noise levels.
    """
    one_of("sample_solver", solver, SOLVERS)
    if solver == "dpm++":
        return DPMSolverPP(num_steps=num_steps, shift=shift)
    product_dtype = torch.bfloat16 if rounds_products else torch.float32
    return UniPC(num_steps=num_steps, shift=shift, product_dtype=product_dtype)
