"""Every knob of a job: name, type, default, allowed values, meaning.

`Job` is the single truth. conf/config.yaml repeats its defaults and meanings (a test compares them), the help page and
the messages are made from it, and below `convert` nothing else describes a job.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType, NoneType
from typing import Annotated, Any, Literal, Self, get_args, get_origin, get_type_hints

from wan21.models import MODELS
from wan21.options import AttentionKernel, Kernels, LinearFormat, LoadStrategy, Precision
from wan21.prompt.settings import Language, Method
from wan21.request import Solver
from wan_sweep.cards import CARDS, DEFAULT_CARD

Scalar = str | int | float | bool | None

Mode = Literal["auto", "measure", "estimate"]
Device = Literal["auto", "cuda", "cpu"]
ForeignProcesses = Literal["warn", "refuse", "wait"]

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What the type of a knob does not say.

    Attributes:
        meaning: One sentence for config.yaml, the help page and the docs.
        choices: Allowed values where the type is not a Literal.
        at_least: Smallest allowed number.
        above: The number has to be larger than this.
        in_key: Whether a job's result depends on it, and so the job key does.
        per_sweep: Whether it holds for the whole sweep and cannot be swept.
    """

    meaning: str
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    in_key: bool = True
    per_sweep: bool = False


@dataclass(frozen=True, kw_only=True)
class Job:
    """One configuration. `rules.resolve` makes one without "auto" and without open defaults from the one asked for."""

    model: Annotated[
        str,
        Rule(
            meaning="Task and architecture; auto is t2v-1.3B, and tiny where a job is measured on a CPU.",
            choices=(AUTO, *MODELS),
        ),
    ] = AUTO
    ckpt_dir: Annotated[
        str | None,
        Rule(meaning="Official checkpoint folder; null takes seeded random weights of the same shapes and dtypes."),
    ] = None
    weights_seed: Annotated[int, Rule(meaning="Seed of the random weights.", at_least=0)] = 0
    mode: Annotated[
        Mode,
        Rule(
            meaning="How to get the numbers; auto measures on a GPU or with device=cpu, else it estimates for a card."
        ),
    ] = "auto"
    card: Annotated[
        str | None,
        Rule(
            meaning=f"Card to estimate for; null is the GPU here if it is one of these, else {DEFAULT_CARD}.",
            choices=tuple(CARDS),
        ),
    ] = None
    device: Annotated[Device, Rule(meaning="Where to measure; auto takes the GPU if there is one.")] = "auto"
    precision: Annotated[Precision, Rule(meaning="Weights and compute of the DiT.")] = "fp16"
    t5_precision: Annotated[Precision, Rule(meaning="Weights and compute of the text encoder.")] = "bf16"
    clip_precision: Annotated[Precision, Rule(meaning="Weights and compute of the image encoder.")] = "fp16"
    vae_precision: Annotated[Precision, Rule(meaning="Weights and compute of the VAE.")] = "fp32"
    load_strategy: Annotated[
        LoadStrategy,
        Rule(
            meaning="full moves whole components to the device; block, or part of one, brings in weights ahead of use."
        ),
    ] = "full"
    offload: Annotated[bool, Rule(meaning="Each component leaves the device when its phase ends.")] = False
    t5_cpu: Annotated[bool, Rule(meaning="The text encoder runs on the CPU.")] = False
    kernels: Annotated[
        Literal["auto"] | Kernels,
        Rule(
            meaning="torch's operators, or fused kernels of our own in the DiT and the VAE's decoder (GPU only); auto "
            "takes those where they run."
        ),
    ] = "torch"
    attention_kernel: Annotated[
        Literal["auto"] | AttentionKernel,
        Rule(
            meaning="Kernel of the DiT's self attention; sdpa leaves the choice to torch, fa3 needs the package "
            "fa3-fwd, fa3_fp8 too and is approximate, auto takes the fastest exact one that is there."
        ),
    ] = "sdpa"
    linear_format: Annotated[
        LinearFormat,
        Rule(
            meaning="Linear layers of the DiT's blocks: same as precision; fp8 stores and multiplies them in eight "
            "bits, fp8_weights and int8_weights only store them so; all are approximate."
        ),
    ] = "same"
    attention_slicing: Annotated[
        bool | int, Rule(meaning="Attention in slices: false, true (a fitting number), or the number.", at_least=1)
    ] = False
    resident_gib: Annotated[
        float, Rule(meaning="Of each streamed component's weights so many GiB stay on the device.", at_least=0)
    ] = 0.0
    host_budget_gib: Annotated[
        float | None,
        Rule(
            meaning="Of each streamed component's weights at most so many GiB wait in pinned host memory, the rest is "
            "read from ckpt_dir ahead of use; null pins all.",
            above=0,
        ),
    ] = None
    rows_at_once: Annotated[
        int | None,
        Rule(
            meaning="Tokens that pass the DiT's norms and linear layers at once, at most; null takes as many as keep "
            "temporaries small.",
            at_least=1,
        ),
    ] = None
    share_first_attention: Annotated[
        bool,
        Rule(
            meaning="Both passes of guidance share the first block's self attention, which has not seen the prompt; a "
            "copy of the residual waits on the device, or, with cfg_parallel, each rank works out half of the heads."
        ),
    ] = False
    residual_on_host: Annotated[
        float, Rule(meaning="Share of the DiT's residual that waits on the host, from 0 to 1.", at_least=0)
    ] = 0.0
    vae_budget_gib: Annotated[
        float | Literal["auto"] | None,
        Rule(
            meaning="GiB that the VAE may take besides its weights: it works in exact tiles; null is whole frames, "
            "auto as much as the DiT's residual, keys and values take.",
            above=0,
        ),
    ] = None
    gradient_checkpointing: Annotated[
        bool, Rule(meaning="Recompute blocks; matters only when gradients are kept, and the report says so.")
    ] = False
    batch_size: Annotated[int, Rule(meaning="Videos per job.", at_least=1)] = 1
    micro_batch_size: Annotated[int, Rule(meaning="Videos that share one forward of the DiT.", at_least=1)] = 1
    ulysses_size: Annotated[int, Rule(meaning="Ranks that share the heads of attention.", at_least=1)] = 1
    ring_size: Annotated[int, Rule(meaning="Ranks that pass keys and values around.", at_least=1)] = 1
    cfg_parallel: Annotated[
        bool, Rule(meaning="The two passes of guidance run on two halves of the ranks, which doubles their number.")
    ] = False
    dit_fsdp: Annotated[bool, Rule(meaning="Shard the DiT's weights over the ranks.")] = False
    t5_fsdp: Annotated[bool, Rule(meaning="Shard the text encoder's weights over the ranks.")] = False
    memory_limit_gib: Annotated[
        float | None,
        Rule(
            meaning="Play a smaller card: limit of the device allocator, on a CPU of the worker's data; null is none.",
            above=0,
        ),
    ] = None
    vram_gib: Annotated[
        float | None,
        Rule(
            meaning="Take the fastest configuration that is estimated to fit into so many GiB; null takes the knobs as "
            "they are.",
            above=0,
        ),
    ] = None
    size: Annotated[str | None, Rule(meaning="WIDTH*HEIGHT in pixels; null is the model's default.")] = None
    frame_num: Annotated[int | None, Rule(meaning="Frames, of the form 4n+1; null is the model's default.")] = None
    prompt: Annotated[str | None, Rule(meaning="What to show; null is a built-in example.")] = None
    image: Annotated[
        str | None,
        Rule(meaning="The picture that i2v starts from, which gives the ratio of sides; null is a built-in example."),
    ] = None
    first_frame: Annotated[
        str | None,
        Rule(meaning="The first frame of flf2v, which gives the ratio of sides; null is a built-in example."),
    ] = None
    last_frame: Annotated[str | None, Rule(meaning="The last frame of flf2v; null is a built-in example.")] = None
    src_video: Annotated[
        str | None,
        Rule(
            meaning="The video that vace starts from, which gives frames and the ratio of sides; null is a blank one."
        ),
    ] = None
    src_mask: Annotated[
        str | None, Rule(meaning="White where vace may change src_video, black where not; null is all white.")
    ] = None
    src_ref_images: Annotated[
        str | None, Rule(meaning="Pictures of what vace shall show, with commas between them; null is none.")
    ] = None
    vace_context_scale: Annotated[float, Rule(meaning="How strongly the sources of vace steer.", at_least=0)] = 1.0
    upstream_quirks: Annotated[
        bool, Rule(meaning="Do as the official code does where that is a mistake (docs/parity.md).")
    ] = False
    use_prompt_extend: Annotated[
        bool, Rule(meaning="A language model writes the prompt out in full before anything else is loaded.")
    ] = False
    prompt_extend_method: Annotated[
        Method,
        Rule(meaning="local_qwen runs a model on the device; dashscope asks a service, with the key in DASH_API_KEY."),
    ] = "local_qwen"
    prompt_extend_model: Annotated[
        str | None,
        Rule(
            meaning="Name of the service's model, or for local_qwen a short name such as Qwen2.5_7B, a folder or a "
            "repository; null is the method's default."
        ),
    ] = None
    prompt_extend_target_lang: Annotated[Language, Rule(meaning="Language of the extended prompt.")] = "zh"
    base_seed: Annotated[int, Rule(meaning="Seed of the noise, the same in all jobs so that they compare.")] = 42
    sample_solver: Annotated[Solver, Rule(meaning="The sampler.")] = "unipc"
    sample_steps: Annotated[int | None, Rule(meaning="Denoising steps; null is the model's default.")] = None
    sample_shift: Annotated[float | None, Rule(meaning="Shift of the noise schedule; null is the model's default.")] = (
        None
    )
    sample_guide_scale: Annotated[
        float | None, Rule(meaning="Classifier-free guidance; 1 switches it off, null is the model's default.")
    ] = None
    block_events: Annotated[
        bool, Rule(meaning="Listen at every transformer block; costs some time, which step times may contain.")
    ] = False
    profile_memory: Annotated[
        bool, Rule(meaning="Name who fills the device at each phase's peak, in an extra run of a few steps.")
    ] = False
    snapshot: Annotated[
        bool,
        Rule(meaning="Memory snapshot for PyTorch's memory_viz, which profile_memory leaves too; needs a GPU."),
    ] = False
    trace: Annotated[bool, Rule(meaning="Trace a few steps with torch's profiler, in an extra run.")] = False
    trace_path: Annotated[
        str | None, Rule(meaning="Folder for the traces; null is the job's own folder.", in_key=False)
    ] = None
    record_stacks: Annotated[
        bool, Rule(meaning="Python stacks in trace and snapshot; they get larger, and the extra runs slower.")
    ] = False
    log_interval: Annotated[int, Rule(meaning="A line in log.txt after so many steps.", at_least=1, in_key=False)] = 1
    fidelity: Annotated[
        bool,
        Rule(meaning="Compare latents and video of each job with those of the sweep's reference.", in_key=False),
    ] = True
    repeats: Annotated[
        int,
        Rule(meaning="Run each job so many times, round by round.", at_least=1, in_key=False, per_sweep=True),
    ] = 1
    name: Annotated[
        str, Rule(meaning="The sweep's name, a folder under output_root.", in_key=False, per_sweep=True)
    ] = "sweep"
    description: Annotated[
        str | None, Rule(meaning="What the sweep is for, in a sentence.", in_key=False, per_sweep=True)
    ] = None
    output_root: Annotated[
        str, Rule(meaning="Where results go, from the folder of the start.", in_key=False, per_sweep=True)
    ] = "outputs"
    experiment_name: Annotated[str, Rule(meaning="Experiment in MLflow.", in_key=False, per_sweep=True)] = "wan-sweep"
    track: Annotated[bool, Rule(meaning="Log to MLflow.", in_key=False, per_sweep=True)] = True
    timeout_s: Annotated[
        float | None, Rule(meaning="Longest wall time of a job in seconds; null is no limit.", above=0, in_key=False)
    ] = None
    stall_timeout_s: Annotated[
        float | None,
        Rule(
            meaning="Longest silence of a job in seconds before it is stopped; null is no limit.", above=0, in_key=False
        ),
    ] = 1800.0
    resume: Annotated[
        bool, Rule(meaning="Take over what is done already; false measures again.", in_key=False, per_sweep=True)
    ] = True
    retry_failed: Annotated[
        bool,
        Rule(
            meaning="When resuming, run jobs again that were not ok (oom, failed, timeout).",
            in_key=False,
            per_sweep=True,
        ),
    ] = True
    foreign_processes: Annotated[
        ForeignProcesses,
        Rule(
            meaning="What to do when other programs use the GPU: warn, refuse to start, or wait until they are gone.",
            in_key=False,
            per_sweep=True,
        ),
    ] = "warn"
    share_gpu: Annotated[
        bool, Rule(meaning="Jobs at the same time may share a GPU; false gives each job GPUs of its own, and waits.")
    ] = False
    save_video: Annotated[bool, Rule(meaning="Write the mp4 or png.", in_key=False)] = True
    plan: Annotated[
        bool, Rule(meaning="List the jobs, estimate those for a card, and stop.", in_key=False, per_sweep=True)
    ] = False

    def to_dict(self) -> dict[str, Scalar]:
        """Knobs by name."""
        return {knob.name: getattr(self, knob.name) for knob in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From what `to_dict` made; keys that are no knobs are passed over, absent ones keep their default."""
        return cls(**{name: values[name] for name in KNOBS if name in values})

    def replace(self, **changes: Scalar) -> Self:
        """The same job with some knobs changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One row of the table."""

    name: str
    kinds: tuple[type, ...]
    choices: tuple[str, ...]
    optional: bool
    default: Scalar
    rule: Rule

    @property
    def allowed(self) -> str:
        """The allowed values in words, such as "fp16, bf16 or fp32"."""
        words = list(self.choices)
        if bool in self.kinds:
            words += ["true", "false"]
        if int in self.kinds or float in self.kinds:
            noun = "a whole number" if int in self.kinds else "a number"
            if self.rule.at_least is not None:
                noun += f" of at least {self.rule.at_least:g}"
            if self.rule.above is not None:
                noun += f" above {self.rule.above:g}"
            words.append(noun)
        if str in self.kinds and not self.choices:
            words.append("text")
        if self.optional:
            words.append("null")
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _knob(field: dataclasses.Field[Any], hint: object) -> Knob:
    base, rule = get_args(hint)
    members = [base] if get_origin(base) is Literal or isinstance(base, type) else list(get_args(base))
    choices = tuple(rule.choices)
    kinds: list[type] = []
    for member in members:
        if get_origin(member) is Literal:
            choices += get_args(member)
            kinds.append(str)
        elif member is not NoneType:
            kinds.append(member)
    return Knob(
        name=field.name,
        kinds=tuple(kinds),
        choices=choices,
        optional=NoneType in members,
        default=None if field.default is dataclasses.MISSING else field.default,
        rule=rule,
    )


def _table() -> Mapping[str, Knob]:
    hints = get_type_hints(Job, include_extras=True)
    return MappingProxyType({field.name: _knob(field, hints[field.name]) for field in dataclasses.fields(Job)})


KNOBS: Mapping[str, Knob] = _table()


def digest(values: object) -> str:
    """Twelve hex digits that change when any of the values does."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:12]


def job_key(job: Job, repeat: int, *, weights: str | None = None, sources: Mapping[str, str] | None = None) -> str:
    """The identity of a resolved job: what its result depends on, and which of its repeats it is.

    Args:
        job: The job, resolved.
        repeat: Which round of the repeats, from 0.
        weights: Fingerprint of the checkpoint folder, which then counts in place of its path.
        sources: Fingerprints of the files that the video is made from, by knob; they count in place of the paths.
    """
    values = {name: getattr(job, name) for name, knob in KNOBS.items() if knob.rule.in_key} | dict(sources or {})
    values["ckpt_dir"] = weights or job.ckpt_dir
    return digest({"knobs": values, "repeat": repeat})


def asked_key(job: Job, repeat: int) -> str:
    """The identity of a job as it was asked for, before "auto" and defaults were resolved on some machine."""
    return digest({"asked": job.to_dict(), "repeat": repeat})


def text(value: Scalar) -> str:
    """A knob's value as one writes it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and float(short := f"{value:g}") == value:
        return short
    return str(value)


def knobs_help() -> str:
    """The table of knobs, as plain text for the help page."""
    lines = []
    for knob in KNOBS.values():
        lines += [f"  {knob.name}={text(knob.default)}", f"      {knob.rule.meaning}", f"      {knob.allowed}"]
    return "\n".join(lines)
