"""What can be chosen: architectures, tasks, and the settings of one generation.

No torch in here: whoever plans runs without a GPU imports this file.

Reference: Wan2.1 (arXiv 2503.20314) and the released checkpoints' sizes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from wan21.errors import UsageError
from wan21.layout import SINGLE, Layout
from wan21.shapes import VideoShape, parse_size

Precision = Literal["fp16", "bf16", "fp32"]
LoadStrategy = Literal["full", "block", "part"]
Solver = Literal["unipc", "dpm++"]
Kernels = Literal["torch", "fused"]
AttentionKernel = Literal["sdpa", "cudnn", "flash", "fa3"]

PRECISIONS: tuple[str, ...] = get_args(Precision)
LOAD_STRATEGIES: tuple[str, ...] = get_args(LoadStrategy)
SOLVERS: tuple[str, ...] = get_args(Solver)
KERNELS: tuple[str, ...] = get_args(Kernels)
ATTENTION_KERNELS: tuple[str, ...] = get_args(AttentionKernel)

NUM_TRAIN_TIMESTEPS = 1000
SAMPLE_FPS = 16
COMPONENTS = ("t5", "dit", "vae")

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"  # noqa: RUF001
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
EXAMPLE_PROMPT = "A red paper kite climbs over a windy harbour while fishing boats rock at their moorings."


@dataclass(frozen=True, kw_only=True)
class DitConfig:
    """Sizes of the diffusion transformer."""

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

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise UsageError(f"dim={self.dim} does not split into num_heads={self.num_heads} heads of even width")

    @property
    def head_dim(self) -> int:
        """Width of one attention head: K."""
        return self.dim // self.num_heads


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
class ModelSpec:
    """One task: its architecture, and what the official command line uses by default."""

    name: str
    dit: DitConfig
    text: TextEncoderConfig
    vae: VaeConfig
    sizes: tuple[str, ...]
    default_size: str
    default_frame_num: int = 81
    default_steps: int = 50
    default_shift: float = 5.0
    default_guide_scale: float = 5.0
    is_image: bool = False
    negative_prompt: str = NEGATIVE_PROMPT


UMT5_XXL = TextEncoderConfig(vocab_size=256384, dim=4096, ffn_dim=10240, num_heads=64, num_layers=24)
DIT_1_3B = DitConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
DIT_14B = DitConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
WAN_VAE = VaeConfig()

SIZES_480P = ("480*832", "832*480")
SIZES_720P = ("720*1280", "1280*720")

MODELS: Mapping[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        # Every part of the real architecture, small: several blocks and heads, all VAE levels, a position bias
        # in every T5 layer, the same order of sizes (T5 > DiT > VAE), and more tokens of video than of text.
        ModelSpec(
            name="tiny",
            dit=DitConfig(dim=256, ffn_dim=640, num_heads=8, num_layers=4, text_dim=256, text_len=128),
            text=TextEncoderConfig(vocab_size=8192, dim=256, ffn_dim=640, num_heads=8, num_layers=4, text_len=128),
            vae=VaeConfig(base_dim=8),
            sizes=("96*64", "160*96", "256*160"),
            default_size="160*96",
            default_frame_num=9,
            default_steps=4,
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
            dit=DIT_14B,
            text=UMT5_XXL,
            vae=WAN_VAE,
            sizes=(*SIZES_720P, *SIZES_480P, "1024*1024"),
            default_size="1024*1024",
            default_frame_num=1,
            is_image=True,
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
    """What to generate. Build it with `make_request`, which fills in the task's defaults and checks all of it."""

    prompt: str
    negative_prompt: str
    shape: VideoShape
    solver: Solver
    num_steps: int
    shift: float
    guide_scale: float
    seed: int
    batch_size: int = 1
    micro_batch_size: int = 1


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
) -> Request:
    """A checked request; None, and the empty negative prompt, mean the task's default.

    Raises:
        UsageError: a value the task cannot do, with the rule and the way out.
    """
    size = size or spec.default_size
    width, height = parse_size(size)
    if size not in spec.sizes:
        raise UsageError(f"size={size} is not a size of {spec.name}; choose {', '.join(spec.sizes)}")
    frame_num = spec.default_frame_num if frame_num is None else frame_num
    if spec.is_image and frame_num != 1:
        raise UsageError(f"frame_num={frame_num} cannot be: {spec.name} makes one image; choose frame_num=1")
    one_of("sample_solver", solver, SOLVERS)
    num_steps = spec.default_steps if num_steps is None else num_steps
    if not 1 <= num_steps <= NUM_TRAIN_TIMESTEPS:
        raise UsageError(f"sample_steps={num_steps} is outside 1 to {NUM_TRAIN_TIMESTEPS}")
    shift = spec.default_shift if shift is None else shift
    if not 0 < shift < float("inf"):
        raise UsageError(f"sample_shift={shift} is not a positive number; {spec.name} uses {spec.default_shift}")
    guide_scale = spec.default_guide_scale if guide_scale is None else guide_scale
    if not 0 <= guide_scale < float("inf"):
        raise UsageError(
            f"sample_guide_scale={guide_scale} is not a number of at least 0; "
            f"{spec.name} uses {spec.default_guide_scale}, and 1 switches guidance off"
        )
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
        shape=VideoShape(num_frames=frame_num, height=height, width=width),
        solver=solver,  # type: ignore[arg-type]
        num_steps=num_steps,
        shift=shift,
        guide_scale=guide_scale,
        seed=seed,
        batch_size=batch_size,
        micro_batch_size=micro_batch_size,
    )


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to run: number formats, and where weights and activations live.

    load_strategy: "full" brings whole components to the device; "block" streams transformer blocks from the host;
        "part" streams parts of them, and keeps what a run needs once on the host: the embeddings of time and prompt but
        while they are computed, and T5's table of tokens always.
    kernels: "torch" runs torch's operators one after the other; "fused" kernels of our own between the large products.
    attention_kernel: of the transformer's self attention; "sdpa" leaves the choice to torch.
    resident_gib: of the streamed weights of each component so much stays on the device.
    rows_at_once: tokens that pass through the transformer's norms and linear layers at once, at most; None: as many as
        keep temporaries small.
    residual_on_host: share of the transformer's residual that waits on the host, 0 to 1; its queries are then sliced
        as finely as `rows_at_once` says.
    vae_budget_gib: what decoding may take beside the VAE's weights; it is then done in tiles, exactly. None: in whole
        frames.
    layout: how the run is spread over processes.

    Raises:
        UsageError: an unknown format or strategy, a number of slices or rows below one, a share outside 0 to 1,
            or a budget below zero.
    """

    precision: Precision = "fp16"
    t5_precision: Precision = "bf16"
    vae_precision: Precision = "fp32"
    offload: bool = False
    load_strategy: LoadStrategy = "full"
    resident_gib: float = 0.0
    t5_cpu: bool = False
    kernels: Kernels = "torch"
    attention_kernel: AttentionKernel = "sdpa"
    attention_slices: int | Literal["auto"] = 1
    rows_at_once: int | None = None
    residual_on_host: float = 0.0
    vae_budget_gib: float | None = None
    gradient_checkpointing: bool = False
    ckpt_dir: str | None = None
    weights_seed: int = 0
    layout: Layout = SINGLE

    def __post_init__(self) -> None:
        for name in ("precision", "t5_precision", "vae_precision"):
            one_of(name, getattr(self, name), PRECISIONS)
        one_of("load_strategy", self.load_strategy, LOAD_STRATEGIES)
        one_of("kernels", self.kernels, KERNELS)
        one_of("attention_kernel", self.attention_kernel, ATTENTION_KERNELS)
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
        self._check_layout()
        if self.vae_budget_gib is not None and not 0 < self.vae_budget_gib < float("inf"):
            raise UsageError(f"vae_budget_gib={self.vae_budget_gib} is not a number of GiB above 0")

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
        if self.layout.ring > 1 and self.attention_kernel == "fa3":
            raise UsageError(
                "attention_kernel=fa3 does not tell its denominator, which ring_size above 1 needs to join the parts; "
                "choose attention_kernel=sdpa, cudnn or flash, or ulysses_size in place of ring_size"
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
    name, way_out = options.attention_kernel, "choose attention_kernel=sdpa"
    if name == "sdpa":
        return
    if device != "cuda":
        raise UsageError(f"attention_kernel={name} runs on an NVIDIA GPU, not on device={device}; {way_out}")
    allowed = ("bf16",) if name == "fa3" else ("bf16", "fp16")
    if options.precision not in allowed:
        raise UsageError(
            f"attention_kernel={name} cannot compute in precision={options.precision}; "
            f"{way_out}, or precision={' or '.join(allowed)}"
        )


def idle_knobs(options: Options, device: str) -> dict[str, str]:
    """Knobs that are set and change nothing in this run, each with the reason."""
    idle = {}
    if options.gradient_checkpointing:
        idle["gradient_checkpointing"] = "no gradients are kept when generating, so there is nothing to recompute"
    if options.resident_gib and options.load_strategy == "full":
        idle["resident_gib"] = "with load_strategy=full all weights stay on the device"
    if options.t5_cpu and device == "cpu":
        idle["t5_cpu"] = "the whole job already runs on the CPU"
    return idle
