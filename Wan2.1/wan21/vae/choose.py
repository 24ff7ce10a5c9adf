"""From what the VAE may take to a plan; before anything is loaded, if that is asked for."""

import math
from functools import cache

import torch

from wan21.errors import VaeBudgetError
from wan21.models import ModelSpec
from wan21.options import Options
from wan21.sources import TASK_SOURCES
from wan21.vae.budget import Budget
from wan21.vae.encode_budget import EncodeBudget
from wan21.vae.plan import WHOLE, DecodePlan
from wan21.vae.vae import Vae

GIB = 2**30
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@cache
def choose_plan(spec: ModelSpec, options: Options, latent_shape: tuple[int, int, int]) -> DecodePlan:
    """The plan of least cost to decode within `vae_budget_gib`; without one in whole frames, if no process shares them.

    It needs no weights, and a tenth of a second.

    Args:
        spec: the task; if it begins with pictures, there has to be enough to encode them, too.
        options: how to run.
        latent_shape: (t, h, w).

    Raises:
        VaeBudgetError: the smallest tiles need more.
    """
    num_ranks = options.layout.world_size
    if options.vae_budget_gib is None and num_ranks == 1:
        return WHOLE
    dtype = DTYPES[options.vae_precision]
    with torch.device("meta"):
        vae = Vae(spec.vae, dtype=dtype, kernels=options.kernels)
    budget = Budget(vae.decoder, latent_shape, itemsize=dtype.itemsize)
    limit = math.inf if options.vae_budget_gib is None else int(options.vae_budget_gib * GIB)
    least = budget.least_bytes()
    if spec.task in TASK_SOURCES and vae.encoder is not None:
        least = max(least, EncodeBudget(vae.encoder, latent_shape, itemsize=dtype.itemsize).least_bytes())
    if limit < least:
        t, h, w = latent_shape
        least_gib = math.ceil(100 * least / GIB) / 100
        raise VaeBudgetError(
            f"vae_budget_gib={options.vae_budget_gib:g} is too little for {t} x {h} x {w} latents in "
            f"{options.vae_precision}; choose {least_gib:g} or more, a smaller vae_precision, a smaller size or fewer "
            "frames",
            least_gib,
        )
    return budget.best_plan(limit, num_ranks)
