"""From what the VAE may take to plans; before anything is loaded, if that is asked for."""

import math
from dataclasses import dataclass
from functools import cache

import torch

from wan21.config import ModelSpec, Options
from wan21.errors import UsageError
from wan21.vae.budget import Budget
from wan21.vae.encode_plan import EncodeBudget
from wan21.vae.plan import WHOLE, DecodePlan
from wan21.vae.vae import Vae

GIB = 2**30
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True, kw_only=True)
class Plans:
    """How videos are decoded, and how those are encoded with which a task begins."""

    decode: DecodePlan
    encode: DecodePlan


@cache
def choose_plans(spec: ModelSpec, options: Options, latent_shape: tuple[int, int, int]) -> Plans:
    """The plans of least work within `vae_budget_gib`; without it whole frames, unless several processes share tiles.

    It needs no weights, and a tenth of a second.

    Args:
        spec: the task.
        options: how to run.
        latent_shape: (t, h, w).

    Raises:
        UsageError: the smallest tiles need more.
    """
    num_ranks = options.layout.world_size
    if options.vae_budget_gib is None and num_ranks == 1:
        return Plans(decode=WHOLE, encode=WHOLE)
    dtype = DTYPES[options.vae_precision]
    with torch.device("meta"):
        vae = Vae(spec.vae, dtype=dtype, kernels=options.kernels)
    decoding = Budget(vae.decoder, latent_shape, itemsize=dtype.itemsize)
    limit = math.inf if options.vae_budget_gib is None else options.vae_budget_gib * GIB
    least, encode = decoding.least_bytes(), WHOLE
    encoding = None
    if spec.clip is not None and vae.encoder is not None and options.vae_budget_gib is not None:
        encoding = EncodeBudget(vae.encoder, latent_shape, itemsize=dtype.itemsize)
        least = max(least, encoding.least_bytes())
    if limit < least:
        t, h, w = latent_shape
        raise UsageError(
            f"vae_budget_gib={options.vae_budget_gib:g} is too little for {t} x {h} x {w} latents in "
            f"{options.vae_precision}; choose {math.ceil(100 * least / GIB) / 100:g} or more, a smaller vae_precision, "
            "a smaller size or fewer frames"
        )
    if encoding is not None:
        encode = encoding.best_plan(limit)
    return Plans(decode=decoding.best_plan(limit, num_ranks), encode=encode)
