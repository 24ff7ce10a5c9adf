"""How long a job takes at the least: operations over the card's rate, bytes over its bandwidths. No torch in here.

Only what cannot be avoided is counted: products of matrices, attention and convolutions at the vendor's peak rate, each
weight read once a forward, streamed weights over the link. Everything else is taken to be free, and work that can go on
side by side to do so. A real run takes longer, on an H100 some 1.5 times.

Letters: L tokens; D model width; M feed-forward width; S prompt tokens; t, h, w of the latents.
"""

from collections.abc import Mapping

from wan21.models import DitConfig, ModelSpec, TextEncoderConfig, VaeConfig
from wan21.options import Options, keeps_passes_apart
from wan21.request import Request
from wan_sweep.cards import Card
from wan_sweep.units import GIB

ITEM_BYTES: Mapping[str, int] = {"fp16": 2, "bf16": 2, "fp32": 4}
OPERATIONS_PER_PRODUCT = 2
"""A multiplication and an addition."""
EIGHT_BIT_RATE = 2
"""Hopper multiplies numbers of eight bits at twice the rate of half precision, by its data sheet."""
KERNEL = 27
"""Numbers in a convolution's kernel of 3 x 3 x 3."""


def lower_bounds(spec: ModelSpec, options: Options, request: Request, card: Card) -> dict[str, float]:
    """Seconds that a phase takes at the least, by its name; `step` is one denoising step.

    Several processes share the tokens and the passes of guidance; weights that they stream come over a link of each.
    What they exchange is not counted.
    """
    layout = options.layout
    texts = 1 if request.guide_scale == 1 else 2
    forwards = 1 if layout.cfg > 1 else texts
    dit_bytes = dit_block_numbers(spec.dit) * num_dit_blocks(spec.dit) * ITEM_BYTES[options.precision]
    t5_bytes = text_block_numbers(spec.text) * spec.text.num_layers * ITEM_BYTES[options.t5_precision]
    videos_at_once = min(request.micro_batch_size, request.batch_size)
    num_groups = -(-request.batch_size // videos_at_once)
    work = dit_operations(spec.dit, options, request.denoised_shape.num_tokens) * videos_at_once / layout.sequence
    rate = card.fp32_flops if options.precision == "fp32" else card.half_flops
    shared = shared_operations(spec, options, request) * videos_at_once / layout.sequence
    step = max((forwards * work - shared) / rate, forwards * _weights_seconds(dit_bytes, options, card))
    vae_rate = card.tf32_flops if options.vae_precision == "fp32" else card.half_flops
    bounds = {
        "encode_text": 0.0 if options.t5_cpu else texts * _weights_seconds(t5_bytes, options, card),
        "step": step,
        "denoise": num_groups * request.num_steps * step,
        "decode": request.batch_size * decode_operations(spec.vae, request.shape.latent) / vae_rate / layout.world_size,
    }
    return {**bounds, "total": bounds["encode_text"] + bounds["denoise"] + bounds["decode"]}


def _weights_seconds(num_bytes: int, options: Options, card: Card) -> float:
    """To read weights once: from the card's memory, and what is streamed over the link at the same time."""
    streamed = 0.0 if options.load_strategy == "full" else max(0.0, num_bytes - options.resident_gib * GIB)
    return max(num_bytes / card.memory_bandwidth, streamed / options.layout.world_size / card.link_bandwidth)


def num_dit_blocks(dit: DitConfig) -> int:
    """Transformer blocks of a forward; those of VACE are as large as the main ones."""
    return dit.num_layers + (len(dit.vace.layers) if dit.vace else 0)


def dit_block_numbers(dit: DitConfig) -> int:
    """Weights in the matrices of one transformer block: eight of attention, two of the feed-forward."""
    return 8 * dit.dim**2 + 2 * dit.dim * dit.ffn_dim


def text_block_numbers(text: TextEncoderConfig) -> int:
    """Weights in the matrices of one block of T5: four of attention, three of the gated feed-forward."""
    return 4 * text.dim**2 + 3 * text.dim * text.ffn_dim


def dit_operations(dit: DitConfig, options: Options, num_tokens: int) -> float:
    """Operations of one forward on one video; keys and values of the prompt and of pictures are left out.

    With fused kernels the prompt's padding is read as one token. How long a prompt is nobody knows here, and it is
    short, so its attention is left out, too.
    """
    linear = num_tokens * (6 * dit.dim**2 + 2 * dit.dim * dit.ffn_dim)
    prompt = 0 if options.kernels == "fused" else 2 * num_tokens * dit.text_len * dit.dim
    products = linear + prompt + _attention_products(dit, options, num_tokens)
    return OPERATIONS_PER_PRODUCT * num_dit_blocks(dit) * products


def shared_operations(spec: ModelSpec, options: Options, request: Request) -> float:
    """Operations that both passes of guidance do once: the first block's self attention, if it is shared.

    Of guidance in parallel what a process leaves to the other: half of the heads, but in no linear layer.
    """
    if not options.share_first_attention or request.guide_scale == 1 or keeps_passes_apart(options, spec):
        return 0.0
    tokens, dit = request.denoised_shape.num_tokens, spec.dit
    attention = _attention_products(dit, options, tokens)
    return OPERATIONS_PER_PRODUCT * (attention / 2 if options.layout.cfg > 1 else 4 * tokens * dit.dim**2 + attention)


def _attention_products(dit: DitConfig, options: Options, num_tokens: int) -> float:
    """Of a block's self attention: as many in half precision as take its time."""
    products = 2 * num_tokens**2 * dit.dim
    return products / (EIGHT_BIT_RATE if options.attention_kernel == "fa3_fp8" else 1)


def decode_operations(vae: VaeConfig, latent: tuple[int, int, int]) -> float:
    """Operations that decoding t x h x w latents takes, without tiles, whose halos are computed twice.

    The first latent frame gives one frame and is convolved with a part of each kernel; it is left out.
    """
    frames, height, width = latent
    dims = [vae.base_dim * multiplier for multiplier in reversed(vae.multipliers)]
    in_time = [*reversed(vae.temporal_downsample), False]
    positions = height * width
    dim = dims[0]
    products = positions * KERNEL * (vae.z_dim * dim + 4 * dim**2)
    for level, level_dim in enumerate(dims):
        for _ in range(vae.num_res_blocks + 1):
            products += positions * KERNEL * (dim * level_dim + level_dim**2)
            dim = level_dim
        if level < len(dims) - 1:
            positions *= (2 if in_time[level] else 1) * 4
            dim //= 2
            products += positions * 9 * (2 * dim * dim)  # a convolution of each frame, 3 x 3
    products += positions * KERNEL * dim * 3
    return float(OPERATIONS_PER_PRODUCT * products * max(0, frames - 1))
