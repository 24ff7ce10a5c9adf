"""What can be chosen: architectures, tasks, and the settings of one generation.

No torch in here: whoever plans runs without a GPU imports this file.

Reference: Wan2.1 (arXiv 2503.20314) and the released checkpoints' sizes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from wan21.errors import UsageError
from wan21.excerpts import choose_excerpt
from wan21.layout import SINGLE, Layout
from wan21.pictures import picture_size
from wan21.shapes import TEMPORAL_STRIDE, VideoShape, parse_size, sides_like
from wan21.sources import NO_SOURCES, Sources, check_sources

Precision = Literal["fp16", "bf16", "fp32"]
LoadStrategy = Literal["full", "block", "part"]
Solver = Literal["unipc", "dpm++"]
Kernels = Literal["torch", "fused"]
AttentionKernel = Literal["sdpa", "cudnn", "flash", "fa3", "fa3_fp8"]
LinearFormat = Literal["same", "fp8", "fp8_weights", "int8_weights"]
Task = Literal["t2v", "t2i", "i2v", "flf2v", "vace"]

PRECISIONS: tuple[str, ...] = get_args(Precision)
LOAD_STRATEGIES: tuple[str, ...] = get_args(LoadStrategy)
SOLVERS: tuple[str, ...] = get_args(Solver)
KERNELS: tuple[str, ...] = get_args(Kernels)
ATTENTION_KERNELS: tuple[str, ...] = get_args(AttentionKernel)
LINEAR_FORMATS: tuple[str, ...] = get_args(LinearFormat)

FA3_KERNELS: tuple[AttentionKernel, ...] = ("fa3", "fa3_fp8")
"""Those of the package fa3-fwd. They compute in bfloat16, or eight bits, on Hopper, and do not tell the denominator."""

HOPPER = 9
"""Major compute capability."""

FP8_PRODUCTS = (8, 9)
"""Compute capability from which on GPUs multiply numbers of eight bits."""

TASKS_WITH_QUIRKS: tuple[Task, ...] = ("flf2v",)
"""Those that prepare their sources with a mistake upstream, which `upstream_quirks` brings back."""

NUM_TRAIN_TIMESTEPS = 1000
SAMPLE_FPS = 16
COMPONENTS = ("t5", "clip", "dit", "vae")

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"  # noqa: RUF001
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
NEGATIVE_PROMPT_I2V = "镜头晃动，" + NEGATIVE_PROMPT  # noqa: RUF001
NEGATIVE_PROMPT_FLF2V = "镜头切换，" + NEGATIVE_PROMPT_I2V  # noqa: RUF001
EXAMPLE_PROMPT = "A red paper kite climbs over a windy harbour while fishing boats rock at their moorings."


@dataclass(frozen=True, kw_only=True)
class VaceConfig:
    """What VACE adds to the diffusion transformer.

    layers: the main blocks with a block of VACE beside them; the first of all has one.
    in_dim: channels of the context: two videos' latents, and 8 x 8 positions of the mask.

    Raises:
        UsageError: layers do not ascend from 0.

    Reference: VACE (arXiv 2503.07598).
    """

    layers: tuple[int, ...]
    in_dim: int = 96

    def __post_init__(self) -> None:
        if self.layers[:1] != (0,) or list(self.layers) != sorted(set(self.layers)):
            raise UsageError(
                f"vace_layers={list(self.layers)} do not ascend from 0; the released ones are 0, 2, 4, ..."
            )


@dataclass(frozen=True, kw_only=True)
class DitConfig:
    """Sizes of the diffusion transformer.

    in_dim: channels that it takes: those of the latents, and of what is laid beside them (`conditioning_dim`).
    image_dim: width of the image tokens that its cross attention reads besides the prompt; 0: it reads none.
    num_image_positions: image tokens that have a learned position; 0: they have none.
    vace: of the blocks that VACE adds, if it has any.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    eps: float = 1e-6
    image_dim: int = 0
    num_image_positions: int = 0
    vace: VaceConfig | None = None

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise UsageError(f"dim={self.dim} does not split into num_heads={self.num_heads} heads of even width")
        if self.vace is not None and self.vace.layers[-1] >= self.num_layers:
            raise UsageError(
                f"vace_layers={list(self.vace.layers)} name a block that num_layers={self.num_layers} does not have"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head: K."""
        return self.dim // self.num_heads

    @property
    def conditioning_dim(self) -> int:
        """Channels of mask and encoded frames beside the latents."""
        return self.in_dim - self.out_dim


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Sizes of the UMT5 encoder."""

    vocab_size: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    num_buckets: int = 32
    max_distance: int = 128
    text_len: int = 512
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """Sizes of the causal video VAE."""

    base_dim: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    z_dim: int = 16
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Sizes of the CLIP image encoder; `num_layers` counts the last one, too, which is never run.

    text_dim: what its head projects to, which is never run either.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    image_size: int = 224
    patch_size: int = 14
    text_dim: int = 1024
    eps: float = 1e-5

    @property
    def num_tokens(self) -> int:
        """Tokens of a picture: its patches, and one for the whole."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One task: its architecture, and what the official command line uses by default.

    clip: of tasks that look at pictures; None where there is nothing to look at.
    shift_480p: shift of the noise schedule at 480p, where it differs.
    """

    name: str
    task: Task = "t2v"
    dit: DitConfig
    text: TextEncoderConfig
    vae: VaeConfig
    clip: ClipConfig | None = None
    sizes: tuple[str, ...]
    default_size: str
    default_frame_num: int = 81
    default_steps: int = 50
    default_shift: float = 5.0
    shift_480p: float | None = None
    default_guide_scale: float = 5.0
    negative_prompt: str = NEGATIVE_PROMPT

    @property
    def is_image(self) -> bool:
        """Whether it makes one image and no video."""
        return self.task == "t2i"

    def shift_at(self, size: str) -> float:
        """Default shift of the noise schedule for a size."""
        return self.shift_480p if self.shift_480p is not None and size in SIZES_480P else self.default_shift


UMT5_XXL = TextEncoderConfig(vocab_size=256384, dim=4096, ffn_dim=10240, num_heads=64, num_layers=24)
DIT_1_3B = DitConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
DIT_14B = DitConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
DIT_I2V_14B = replace(DIT_14B, in_dim=36, image_dim=1280)
DIT_FLF2V_14B = replace(DIT_I2V_14B, num_image_positions=514)
DIT_VACE_1_3B = replace(DIT_1_3B, vace=VaceConfig(layers=tuple(range(0, 30, 2))))
DIT_VACE_14B = replace(DIT_14B, vace=VaceConfig(layers=tuple(range(0, 40, 5))))
WAN_VAE = VaeConfig()
CLIP_VIT_H = ClipConfig(dim=1280, ffn_dim=5120, num_heads=16, num_layers=32)

SIZES_480P = ("480*832", "832*480")
SIZES_720P = ("720*1280", "1280*720")

# Every part of the real architecture, small: several blocks and heads, all VAE levels, a position bias in every T5
# layer, the same order of sizes (T5 > DiT > VAE), and more tokens of video than of text.
TINY = ModelSpec(
    name="tiny",
    dit=DitConfig(dim=256, ffn_dim=640, num_heads=8, num_layers=4, text_dim=256, text_len=128),
    text=TextEncoderConfig(vocab_size=8192, dim=256, ffn_dim=640, num_heads=8, num_layers=4, text_len=128),
    vae=VaeConfig(base_dim=8),
    sizes=("96*64", "160*96", "256*160"),
    default_size="160*96",
    default_frame_num=9,
    default_steps=4,
)
TINY_CLIP = ClipConfig(dim=64, ffn_dim=128, num_heads=2, num_layers=4, image_size=56, text_dim=32)
TINY_DIT_I2V = replace(TINY.dit, in_dim=36, image_dim=TINY_CLIP.dim)

MODELS: Mapping[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        TINY,
        replace(TINY, name="tiny-t2i", task="t2i", default_frame_num=1),
        replace(
            TINY,
            name="tiny-i2v",
            task="i2v",
            dit=TINY_DIT_I2V,
            clip=TINY_CLIP,
            negative_prompt=NEGATIVE_PROMPT_I2V,
        ),
        replace(
            TINY,
            name="tiny-flf2v",
            task="flf2v",
            dit=replace(TINY_DIT_I2V, num_image_positions=2 * TINY_CLIP.num_tokens),
            clip=TINY_CLIP,
            default_shift=16.0,
            negative_prompt=NEGATIVE_PROMPT_FLF2V,
        ),
        replace(
            TINY,
            name="tiny-vace",
            task="vace",
            dit=replace(TINY.dit, vace=VaceConfig(layers=(0, 2))),
            default_shift=16.0,
        ),
        ModelSpec(name="t2v-1.3B", dit=DIT_1_3B, text=UMT5_XXL, vae=WAN_VAE, sizes=SIZES_480P, default_size="832*480"),
        ModelSpec(
            name="t2v-14B",
            dit=DIT_14B,
            text=UMT5_XXL,
            vae=WAN_VAE,
            sizes=SIZES_720P + SIZES_480P,
            default_size="1280*720",
        ),
        ModelSpec(
            name="t2i-14B",
            task="t2i",
            dit=DIT_14B,
            text=UMT5_XXL,
            vae=WAN_VAE,
            sizes=(*SIZES_720P, *SIZES_480P, "1024*1024"),
            default_size="1024*1024",
            default_frame_num=1,
        ),
        ModelSpec(
            name="i2v-14B",
            task="i2v",
            dit=DIT_I2V_14B,
            text=UMT5_XXL,
            vae=WAN_VAE,
            clip=CLIP_VIT_H,
            sizes=SIZES_720P + SIZES_480P,
            default_size="1280*720",
            default_steps=40,
            shift_480p=3.0,
            negative_prompt=NEGATIVE_PROMPT_I2V,
        ),
        ModelSpec(
            name="flf2v-14B",
            task="flf2v",
            dit=DIT_FLF2V_14B,
            text=UMT5_XXL,
            vae=WAN_VAE,
            clip=CLIP_VIT_H,
            sizes=SIZES_720P + SIZES_480P,
            default_size="1280*720",
            default_shift=16.0,
            negative_prompt=NEGATIVE_PROMPT_FLF2V,
        ),
        ModelSpec(
            name="vace-1.3B",
            task="vace",
            dit=DIT_VACE_1_3B,
            text=UMT5_XXL,
            vae=WAN_VAE,
            sizes=SIZES_480P,
            default_size="832*480",
            default_shift=16.0,
        ),
        ModelSpec(
            name="vace-14B",
            task="vace",
            dit=DIT_VACE_14B,
            text=UMT5_XXL,
            vae=WAN_VAE,
            sizes=SIZES_720P + SIZES_480P,
            default_size="1280*720",
            default_shift=16.0,
        ),
    )
}


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuses a value that is not among the allowed ones.

    Raises:
        UsageError: names the value and what is allowed.
    """
    if value not in allowed:
        raise UsageError(f"{name}={value} is not known; choose {', '.join(allowed)}")


def model_spec(name: str) -> ModelSpec:
    """The task of this name.

    Raises:
        UsageError: there is no such task.
    """
    one_of("model", name, tuple(MODELS))
    return MODELS[name]


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to generate. Build it with `make_request`, which fills in the task's defaults and checks all of it.

    size, frame_num: those that were chosen. For tasks that start from a picture the size gives the area, and the
        picture the ratio of sides; a source video gives the ratio and the frames, and size and frame_num are the most
        that it may have of them. So `shape` may differ from both.
    vace_context_scale: how strongly sources steer; of VACE's models only.
    sources: files it is made from; an example of our own stands in for what is not given.
    upstream_quirks: do as the official code does where that is a mistake (docs/parity.md).
    """

    prompt: str
    negative_prompt: str
    size: str
    frame_num: int
    shape: VideoShape
    solver: Solver
    num_steps: int
    shift: float
    guide_scale: float
    seed: int
    batch_size: int = 1
    micro_batch_size: int = 1
    sources: Sources = NO_SOURCES
    vace_context_scale: float = 1.0
    upstream_quirks: bool = False

    @property
    def denoised_shape(self) -> VideoShape:
        """Of what is denoised: the video, and in front of it as many frames as make a latent frame per reference."""
        more = TEMPORAL_STRIDE * len(self.sources.src_ref_images)
        return replace(self.shape, num_frames=self.shape.num_frames + more)


def make_request(
    spec: ModelSpec,
    *,
    seed: int,
    prompt: str | None = None,
    negative_prompt: str = "",
    size: str | None = None,
    frame_num: int | None = None,
    solver: str = "unipc",
    num_steps: int | None = None,
    shift: float | None = None,
    guide_scale: float | None = None,
    batch_size: int = 1,
    micro_batch_size: int = 1,
    sources: Sources = NO_SOURCES,
    vace_context_scale: float = 1.0,
    upstream_quirks: bool = False,
) -> Request:
    """A checked request; None, and the empty negative prompt, mean the task's default.

    Raises:
        UsageError: a value the task cannot do, with the rule and the way out.
    """
    size = size or spec.default_size
    parse_size(size)
    if size not in spec.sizes:
        raise UsageError(f"size={size} is not a size of {spec.name}; choose {', '.join(spec.sizes)}")
    check_sources(spec, sources)
    frame_num = spec.default_frame_num if frame_num is None else frame_num
    if spec.is_image and frame_num != 1:
        raise UsageError(f"frame_num={frame_num} cannot be: {spec.name} makes one image; choose frame_num=1")
    if spec.task == "flf2v" and frame_num == 1:
        raise UsageError(f"frame_num=1 cannot be: {spec.name} runs from a first to a last frame; choose 5 or more")
    one_of("sample_solver", solver, SOLVERS)
    num_steps = spec.default_steps if num_steps is None else num_steps
    if not 1 <= num_steps <= NUM_TRAIN_TIMESTEPS:
        raise UsageError(f"sample_steps={num_steps} is outside 1 to {NUM_TRAIN_TIMESTEPS}")
    shift = spec.shift_at(size) if shift is None else shift
    if not 0 < shift < float("inf"):
        raise UsageError(f"sample_shift={shift} is not a positive number; {spec.name} uses {spec.shift_at(size)}")
    guide_scale = spec.default_guide_scale if guide_scale is None else guide_scale
    if not 0 <= guide_scale < float("inf"):
        raise UsageError(
            f"sample_guide_scale={guide_scale} is not a number of at least 0; "
            f"{spec.name} uses {spec.default_guide_scale}, and 1 switches guidance off"
        )
    _check_context_scale(spec, vace_context_scale)
    if not 0 <= seed < 2**63:
        raise UsageError(f"base_seed={seed} is outside 0 to 2**63 - 1")
    if batch_size < 1 or not 1 <= micro_batch_size <= batch_size:
        raise UsageError(
            f"batch_size={batch_size}, micro_batch_size={micro_batch_size}: both are at least 1, "
            "and micro_batch_size is at most batch_size"
        )
    return Request(
        prompt=EXAMPLE_PROMPT if prompt is None else prompt,
        negative_prompt=negative_prompt or spec.negative_prompt,
        size=size,
        frame_num=frame_num,
        shape=_video_shape(size, frame_num, sources),
        solver=solver,  # type: ignore[arg-type]
        num_steps=num_steps,
        shift=shift,
        guide_scale=guide_scale,
        seed=seed,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
        sources=sources,
        vace_context_scale=vace_context_scale,
        upstream_quirks=upstream_quirks,
    )


def _check_context_scale(spec: ModelSpec, scale: float) -> None:
    if spec.task != "vace" and scale != 1:
        raise UsageError(
            f"vace_context_scale={scale} belongs to the vace models, and {spec.name} is none; leave it out"
        )
    if not 0 <= scale < float("inf"):
        raise UsageError(f"vace_context_scale={scale} is not a number of at least 0; upstream uses 1")


def _video_shape(size: str, num_frames: int, sources: Sources) -> VideoShape:
    """Frames and sides of the video: as chosen, or with a picture's ratio of sides, or as a source video has them."""
    width, height = parse_size(size)
    if sources.src_video is not None:
        chosen = VideoShape(num_frames=num_frames, height=height, width=width)
        return choose_excerpt("src_video", sources.src_video, chosen).shape
    name = "image" if sources.image else "first_frame"
    path = getattr(sources, name)
    if path is not None:
        try:
            height, width = sides_like(picture_size(name, path), area=width * height)
        except UsageError as error:
            raise UsageError(f"{name}={path}: {error}") from error
    return VideoShape(num_frames=num_frames, height=height, width=width)


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to run: number formats, and where weights and activations live.

    load_strategy: "full" brings whole components to the device; "block" streams transformer blocks from the host;
        "part" streams parts of them, and keeps what a run needs once on the host: the embeddings of time and prompt but
        while they are computed, and T5's table of tokens always.
    kernels: "torch" runs torch's operators one after the other; "fused" kernels of our own, between the
        transformer's products and in the decoder of the VAE.
    attention_kernel: of the transformer's self attention; "sdpa" leaves the choice to torch, "fa3_fp8" is approximate.
    linear_format: of the linear layers in the transformer's blocks: "same" as `precision`; or, approximately, "fp8":
        stored and multiplied in e4m3; "fp8_weights": stored so, multiplied in `precision`; "int8_weights": likewise.
    resident_gib: of the streamed weights of each component so much stays on the device.
    host_budget_gib: of each component at most so much waits in pinned host memory; the rest is read from the
        checkpoint's files ahead of use. None: all of it waits.
    rows_at_once: tokens that pass through the transformer's norms and linear layers at once, at most; None: as many as
        keep temporaries small.
    share_first_attention: of both passes of guidance one works out the first block's self attention, which has not seen
        the prompt, and the other takes it over; a copy of the residual waits in between. Where two processes make one
        pass each, either works out half of the heads.
    residual_on_host: share of the transformer's residual that waits on the host, 0 to 1; its queries are then sliced
        as finely as `rows_at_once` says.
    vae_budget_gib: what the VAE may take beside its weights; it then works in tiles, exactly. None: in whole frames.
    layout: how the run is spread over processes.

    Raises:
        UsageError: an unknown format or strategy, a number of slices or rows below one, a share outside 0 to 1,
            a budget that is not above zero, or two options that contradict each other.
    """

    precision: Precision = "fp16"
    t5_precision: Precision = "bf16"
    clip_precision: Precision = "fp16"
    vae_precision: Precision = "fp32"
    offload: bool = False
    load_strategy: LoadStrategy = "full"
    resident_gib: float = 0.0
    host_budget_gib: float | None = None
    t5_cpu: bool = False
    kernels: Kernels = "torch"
    attention_kernel: AttentionKernel = "sdpa"
    linear_format: LinearFormat = "same"
    attention_slices: int | Literal["auto"] = 1
    rows_at_once: int | None = None
    share_first_attention: bool = False
    residual_on_host: float = 0.0
    vae_budget_gib: float | None = None
    gradient_checkpointing: bool = False
    ckpt_dir: str | None = None
    weights_seed: int = 0
    layout: Layout = SINGLE

    def __post_init__(self) -> None:
        for name in ("precision", "t5_precision", "clip_precision", "vae_precision"):
            one_of(name, getattr(self, name), PRECISIONS)
        one_of("load_strategy", self.load_strategy, LOAD_STRATEGIES)
        one_of("kernels", self.kernels, KERNELS)
        one_of("attention_kernel", self.attention_kernel, ATTENTION_KERNELS)
        one_of("linear_format", self.linear_format, LINEAR_FORMATS)
        if self.attention_slices != "auto" and self.attention_slices < 1:
            raise UsageError(
                f"attention_slicing={self.attention_slices} is not a number of slices; "
                "choose false, true, or an integer of at least 1"
            )
        if self.rows_at_once is not None and self.rows_at_once < 1:
            raise UsageError(f"rows_at_once={self.rows_at_once} is not a number of tokens; choose 1 or more, or None")
        if not 0 <= self.residual_on_host <= 1:
            raise UsageError(f"residual_on_host={self.residual_on_host} is not a share; choose 0 to 1, such as 0.5")
        if not 0 <= self.resident_gib < float("inf"):
            raise UsageError(f"resident_gib={self.resident_gib} is not a number of GiB of at least 0; 0 keeps nothing")
        self._check_sharing()
        if self.host_budget_gib is not None and not 0 < self.host_budget_gib < float("inf"):
            raise UsageError(f"host_budget_gib={self.host_budget_gib} is not a number of GiB above 0; None pins all")
        self._check_layout()
        if self.vae_budget_gib is not None and not 0 < self.vae_budget_gib < float("inf"):
            raise UsageError(f"vae_budget_gib={self.vae_budget_gib} is not a number of GiB above 0")

    def _check_sharing(self) -> None:
        if not self.share_first_attention:
            return
        if self.residual_on_host:
            raise UsageError(
                f"share_first_attention=true keeps a copy of the residual on the device, and residual_on_host="
                f"{self.residual_on_host:g} keeps the residual off it; choose one"
            )
        if self.load_strategy == "part":
            raise UsageError(
                "share_first_attention=true passes over weights that load_strategy=part brings in one after the other; "
                "choose load_strategy=block or full, or share_first_attention=false"
            )

    def _check_layout(self) -> None:
        for name in ("dit_fsdp", "t5_fsdp"):
            if getattr(self.layout, name) and self.load_strategy != "full":
                raise UsageError(
                    f"{name}=true and load_strategy={self.load_strategy} both say where weights live; choose "
                    f"{name}=false, since streamed weights are shared by all ranks anyway, or load_strategy=full"
                )
        if self.layout.t5_fsdp and self.t5_cpu:
            raise UsageError(
                "t5_fsdp=true shares the text encoder among devices, and t5_cpu=true keeps it off them; choose one"
            )
        if self.layout.dit_fsdp and self.linear_format != "same":
            raise UsageError(
                f"dit_fsdp=true shares layers of one number format, and linear_format={self.linear_format} has two; "
                "choose load_strategy=block, which shares streamed weights among all ranks, or linear_format=same"
            )
        if self.layout.ring > 1 and self.attention_kernel in FA3_KERNELS:
            raise UsageError(
                f"attention_kernel={self.attention_kernel} does not tell its denominator, which ring_size above 1 "
                "needs to join the parts; choose attention_kernel=sdpa, cudnn or flash, or ulysses_size in place of "
                "ring_size"
            )


def check_device(options: Options, device: str) -> None:
    """Refuses kernels that the device, or the number format on it, does not have.

    Raises:
        UsageError: names the knob, what it needs, and the way out.
    """
    if options.kernels != "torch" and device != "cuda":
        raise UsageError(
            f"kernels={options.kernels} runs on an NVIDIA GPU, not on device={device}; choose kernels=torch"
        )
    _check_linear_format(options, device)
    name, way_out = options.attention_kernel, "choose attention_kernel=sdpa"
    if name == "sdpa":
        return
    if device != "cuda":
        raise UsageError(f"attention_kernel={name} runs on an NVIDIA GPU, not on device={device}; {way_out}")
    allowed = ("bf16",) if name in FA3_KERNELS else ("bf16", "fp16")
    if options.precision not in allowed:
        raise UsageError(
            f"attention_kernel={name} cannot compute in precision={options.precision}; "
            f"{way_out}, or precision={' or '.join(allowed)}"
        )


def _check_linear_format(options: Options, device: str) -> None:
    if options.linear_format != "fp8":
        return
    way_out = "linear_format=fp8_weights, which multiplies in precision"
    if device != "cuda":
        raise UsageError(f"linear_format=fp8 multiplies on an NVIDIA GPU, not on device={device}; choose {way_out}")
    if options.kernels != "fused":
        raise UsageError(
            f"linear_format=fp8 quantises in kernels of our own, and kernels={options.kernels} has none; "
            f"choose kernels=fused, or {way_out}"
        )
    if options.precision != "bf16":
        raise UsageError(
            f"linear_format=fp8 gives sums in bf16, not in precision={options.precision}; "
            f"choose precision=bf16, or {way_out}"
        )


def check_capability(options: Options, capability: tuple[int, int]) -> None:
    """Refuses what GPUs of this compute capability cannot do.

    Raises:
        UsageError: names the knob, what it needs, and the way out.
    """
    this = f"this one has compute capability {'.'.join(map(str, capability))}"
    if options.attention_kernel in FA3_KERNELS and capability[0] != HOPPER:
        raise UsageError(
            f"attention_kernel={options.attention_kernel} needs a Hopper GPU, and {this}; choose attention_kernel=sdpa"
        )
    if options.linear_format == "fp8" and capability < FP8_PRODUCTS:
        raise UsageError(
            f"linear_format=fp8 needs a GPU of compute capability {'.'.join(map(str, FP8_PRODUCTS))} or higher, and "
            f"{this}; choose linear_format=fp8_weights, which multiplies in precision"
        )


def rounds_products(spec: ModelSpec, options: Options, request: Request) -> bool:
    """Whether the sampler shall form two products in bfloat16, as upstream's UniPC does.

    Upstream does so on the GPU only, and the tasks that look at pictures have it step on the CPU with offload.
    """
    steps_on_cpu = spec.clip is not None and options.offload
    return request.upstream_quirks and request.solver == "unipc" and not steps_on_cpu


def _has_quirks(spec: ModelSpec, options: Options, request: Request) -> bool:
    return spec.task in TASKS_WITH_QUIRKS or rounds_products(spec, options, request)


def idle_knobs(
    options: Options, device: str, spec: ModelSpec | None = None, request: Request | None = None
) -> dict[str, str]:
    """Knobs that are set and change nothing in this run, each with the reason.

    Args:
        options: how to run.
        device: "cpu" or "cuda".
        spec: the task; None leaves out what depends on it.
        request: what to generate; None leaves out what depends on it.
    """
    idle = {}
    if spec is not None and spec.clip is None and options.clip_precision != Options.clip_precision:
        idle["clip_precision"] = f"{spec.name} looks at no pictures"
    if spec is not None and request is not None and request.upstream_quirks and not _has_quirks(spec, options, request):
        idle["upstream_quirks"] = f"{spec.name} does as upstream anyway, with this solver and offload={options.offload}"
    if options.gradient_checkpointing:
        idle["gradient_checkpointing"] = "no gradients are kept when generating, so there is nothing to recompute"
    if options.resident_gib and options.load_strategy == "full":
        idle["resident_gib"] = "with load_strategy=full all weights stay on the device"
    if options.share_first_attention and (reason := _nothing_to_share(options, spec, request)):
        idle["share_first_attention"] = reason
    if options.host_budget_gib is not None and options.load_strategy == "full":
        idle["host_budget_gib"] = "with load_strategy=full no weights wait on the host"
    if options.t5_cpu and device == "cpu":
        idle["t5_cpu"] = "the whole job already runs on the CPU"
    return idle


def _nothing_to_share(options: Options, spec: ModelSpec | None, request: Request | None) -> str:
    """Why there are no two passes that begin alike and can share that; empty if there are."""
    if request is not None and request.guide_scale == 1:
        return "with sample_guide_scale=1 there is one pass"
    return "" if spec is None else keeps_passes_apart(options, spec)


def keeps_passes_apart(options: Options, spec: ModelSpec) -> str:
    """Why both passes of guidance cannot share the first block's self attention; empty if they can."""
    layout = options.layout
    if spec.dit.vace is not None:
        return f"the control stream of {spec.name} begins before the first block"
    if layout.cfg > 1 and layout.ring > 1:
        return "with cfg_parallel=true heads would be shared, which go round the ring of ring_size in groups"
    if layout.cfg > 1 and (heads := spec.dit.num_heads // layout.ulysses) % layout.cfg:
        return f"with cfg_parallel=true {layout.cfg} ranks would share the {heads} heads that each of them has"
    return ""
