"""How to run: number formats, kernels, where weights and activations live, what each needs. No torch in here."""

from dataclasses import dataclass
from typing import Literal, get_args

from wan21.errors import UsageError, one_of
from wan21.layout import SINGLE, Layout
from wan21.models import ModelSpec, Task
from wan21.request import Request

Precision = Literal["fp16", "bf16", "fp32"]
LoadStrategy = Literal["full", "block", "part"]
Kernels = Literal["torch", "fused"]
AttentionKernel = Literal["sdpa", "cudnn", "flash", "fa3", "fa3_fp8"]
LinearFormat = Literal["same", "fp8", "fp8_weights", "int8_weights"]

PRECISIONS: tuple[str, ...] = get_args(Precision)
LOAD_STRATEGIES: tuple[str, ...] = get_args(LoadStrategy)
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
