"""From what decoding may take to a plan; before anything is loaded, if that is asked for."""

import math
from functools import cache

import torch

from wan21.config import Options, VaeConfig
from wan21.errors import UsageError
from wan21.vae.budget import Budget
from wan21.vae.decoder import Decoder
from wan21.vae.plan import WHOLE, DecodePlan

GIB = 2**30
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@cache
def choose_plan(config: VaeConfig, options: Options, latent_shape: tuple[int, int, int]) -> DecodePlan:
    """The plan of least work within `vae_budget_gib`; whole frames if there is none.

    It needs no weights, and a tenth of a second.

    Args:
        config: sizes of the VAE.
        options: how to run.
        latent_shape: (t, h, w).

    Raises:
        UsageError: the smallest tiles need more.
    """
    if options.vae_budget_gib is None:
        return WHOLE
    dtype = DTYPES[options.vae_precision]
    with torch.device("meta"):
        decoder = Decoder(config, dtype=dtype, kernels=options.kernels)
    budget = Budget(decoder, latent_shape, itemsize=dtype.itemsize)
    least = budget.least_bytes()
    if options.vae_budget_gib * GIB < least:
        frames, height, width = latent_shape
        raise UsageError(
            f"vae_budget_gib={options.vae_budget_gib:g} is too little to decode {frames} x {height} x {width} latents "
            f"in {options.vae_precision}; choose {math.ceil(100 * least / GIB) / 100:g} or more, a smaller "
            "vae_precision, a smaller size or fewer frames"
        )
    return budget.best_plan(int(options.vae_budget_gib * GIB))
