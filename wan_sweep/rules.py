"""Which jobs this machine and this version can run, and what "auto" and null mean on it."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from wan21.errors import WanError
from wan21.layout import Layout
from wan21.models import ModelSpec, model_spec
from wan21.options import check_capability, check_device
from wan21.parallel.layout import check_layout
from wan21.request import Request
from wan21.waiting import check_host_budget, check_host_room
from wan_sweep.build import build_extension, build_layout, build_options, build_request
from wan_sweep.cards import DEFAULT_CARD, card_like, card_named
from wan_sweep.environment import Machine
from wan_sweep.errors import UsageError
from wan_sweep.estimate.lower_bound import ITEM_BYTES
from wan_sweep.schema import AUTO, KNOBS, Job, Scalar
from wan_sweep.units import GIB

LEAST_VAE_BUDGET_GIB = {"fp32": 1.0, "fp16": 0.69, "bf16": 0.69}
"""What vae_budget_gib=auto is at the least: smaller tiles repeat too much of their neighbours' work."""

DEFAULT_MODEL = "t2v-1.3B"
CPU_DEFAULT_MODEL = "tiny"


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A job with everything decided.

    Attributes:
        refusal: Why it cannot run here; empty if it can.
        weights: Fingerprint of its checkpoint folder; None for random weights.
        sources: Fingerprints of the files that it is made from, by knob.
    """

    job: Job
    refusal: str = ""
    weights: str | None = None
    sources: Mapping[str, str] = field(default_factory=dict)


def resolve(job: Job, machine: Machine) -> Resolved:
    """What the job is on this machine, or why it cannot be."""
    mode = mode_of(job, machine)
    is_estimate = mode == "estimate"
    device = job.device
    if device == AUTO:
        device = "cuda" if is_estimate or machine.num_gpus else "cpu"
    model = (DEFAULT_MODEL if device == "cuda" else CPU_DEFAULT_MODEL) if job.model == AUTO else job.model
    job = job.replace(model=model, device=device, mode=mode, card=card_of(job, machine) if is_estimate else job.card)
    job = _with_kernels(job, machine)
    try:
        _check_mode(job)
        request = build_request(job)
        job = job.replace(vae_budget_gib=vae_budget(job, request))
        check_device(build_options(job), device)
        if is_estimate:
            check_capability(build_options(job), card_named(str(job.card)).capability)
        job = job.replace(
            size=request.size,
            frame_num=request.frame_num,
            prompt=request.prompt,
            sample_steps=request.num_steps,
            sample_shift=float(request.shift),
            sample_guide_scale=float(request.guide_scale),
            **_extension_knobs(job),
        )
        layout = build_layout(job)
        check_layout(layout, model_spec(model), request)
        if not is_estimate:
            check_host_budget(build_options(job))
            _check_device(job, machine)
            _check_capability(job, machine)
            _check_ranks(layout, device, machine)
        check_host_room(model_spec(model), build_options(job), device)
        if job.ckpt_dir is not None:
            job = job.replace(weights_seed=0)  # nothing depends on it, so the job key must not either
        weights = _check_checkpoint(job, model_spec(model))
        return Resolved(job=job, weights=weights, sources=request.sources.fingerprints())
    except WanError as error:
        return Resolved(job=job, refusal=str(error))


def _with_kernels(job: Job, machine: Machine) -> Job:
    """The job with the best kernels that are there, where it leaves the choice."""
    is_cuda = job.device == "cuda" and machine.num_gpus > 0
    is_hopper = is_cuda and all(gpu.compute_capability.startswith("9.") for gpu in machine.gpus)
    if job.kernels == AUTO:  # an estimate is of a machine with a GPU, whose torch brings triton
        has_triton = job.mode == "estimate" or (is_cuda and "triton" in machine.packages)
        job = job.replace(kernels="fused" if has_triton and job.device == "cuda" else "torch")
    if job.attention_kernel == AUTO:
        has_fa3 = job.mode != "estimate" and is_hopper and "fa3_fwd_interface" in machine.packages
        can_fa3 = has_fa3 and job.precision == "bf16" and job.ring_size == 1
        job = job.replace(attention_kernel="fa3" if can_fa3 else "sdpa")
    return job


def vae_budget(job: Job, request: Request) -> float | None:
    """The job's budget of the VAE in GiB; where it leaves the choice, one that hardly raises the peak of the run."""
    if job.vae_budget_gib != AUTO:
        return cast("float | None", job.vae_budget_gib)
    dim, layout = model_spec(job.model).dit.dim, build_layout(job)
    num_tokens = -(-request.denoised_shape.num_tokens // layout.sequence) * job.micro_batch_size
    residual_keys_values = num_tokens * dim * (ITEM_BYTES["fp32"] + 2 * ITEM_BYTES[job.precision])
    return max(LEAST_VAE_BUDGET_GIB[job.vae_precision], round(residual_keys_values / GIB, 2))


def _extension_knobs(job: Job) -> dict[str, Scalar]:
    """The knobs of prompt extension with its model decided, or at their defaults where nothing depends on them."""
    extension = build_extension(job)
    if extension is None:
        names = ("prompt_extend_method", "prompt_extend_model", "prompt_extend_target_lang")
        return {name: KNOBS[name].default for name in names}
    return {"prompt_extend_model": extension.model}


def mode_of(job: Job, machine: Machine) -> str:
    """How the job's numbers are got: estimated where a card is named, or where there is no GPU to measure on."""
    if job.mode != AUTO:
        return job.mode
    has_nowhere_to_run = job.device == AUTO and not machine.num_gpus
    return "estimate" if job.card is not None or has_nowhere_to_run else "measure"


def card_of(job: Job, machine: Machine) -> str:
    """The card that an estimate is for: the one named, or the GPU that is here, or the default one."""
    if job.card is not None:
        return job.card
    here = next(filter(None, (card_like(gpu.name, gpu.total_bytes) for gpu in machine.gpus)), None)
    return DEFAULT_CARD if here is None else here.name


def _check_mode(job: Job) -> None:
    if job.mode == "measure" and job.card is not None:
        raise UsageError(
            f"card={job.card} is for estimates, and mode=measure measures what is here; leave the card out, or choose "
            "mode=estimate"
        )
    if job.mode != "estimate":
        return
    if job.device == "cpu":
        raise UsageError(
            "device=cpu cannot be estimated, for estimates are of cards; leave card and mode=estimate out to measure "
            "on the CPU, or leave device=cpu out"
        )
    if job.linear_format != "same":
        raise UsageError(
            f"linear_format={job.linear_format} cannot be estimated: it was not compared with measured runs; choose "
            "linear_format=same"
        )
    if job.use_prompt_extend:
        raise UsageError(
            "use_prompt_extend=true cannot be estimated: the language model is not gone through; choose false, which "
            "changes nothing of what the video's own phases take"
        )
    for name in ("profile_memory", "snapshot", "trace"):
        if getattr(job, name):
            raise UsageError(
                f"{name}=true needs a run that can be watched, and mode=estimate runs nothing; choose {name}=false "
                "(an estimate names what fills the card without it), or mode=measure"
            )


def _check_capability(job: Job, machine: Machine) -> None:
    for gpu in machine.gpus if job.device == "cuda" else ():
        if gpu.compute_capability:  # or the driver does not tell; the worker asks torch
            major, minor = map(int, gpu.compute_capability.split("."))
            check_capability(build_options(job), (major, minor))


def _check_ranks(layout: Layout, device: str, machine: Machine) -> None:
    """Refuses more ranks than there are GPUs, and in a world that is there already any other number than its own."""
    num_ranks, world = layout.world_size, machine.world
    if world is not None and num_ranks != world.size:
        raise UsageError(
            f"{layout.words()} makes {num_ranks} rank{'s' if num_ranks > 1 else ''}, and torchrun has started "
            f"{world.size}; choose sizes whose product is {world.size}, or start the sweep without torchrun"
        )
    if device != "cuda":
        return
    if world is None and num_ranks > machine.num_gpus:
        raise UsageError(
            f"{layout.words()} needs {num_ranks} GPUs, this machine has {machine.num_gpus}; "
            f"choose sizes whose product is at most {machine.num_gpus}"
        )
    if world is not None and world.local_size > machine.num_gpus:
        raise UsageError(
            f"{layout.words()} needs {world.local_size} GPUs on each machine, this one has {machine.num_gpus}; "
            "start fewer processes on it"
        )


def _check_device(job: Job, machine: Machine) -> None:
    if job.snapshot and job.device == "cpu":
        raise UsageError(
            "snapshot=true needs a GPU, since only CUDA's allocator writes one; profile_memory=true names what fills "
            "the memory on a CPU too"
        )
    if job.device != "cuda" or machine.num_gpus:
        return
    if machine.gpus:
        raise UsageError(
            f"device=cuda cannot be: torch {machine.torch_version} is built without CUDA; "
            "install a CUDA build of torch, or choose device=cpu or mode=estimate"
        )
    raise UsageError(
        "device=cuda cannot be: there is no NVIDIA GPU that this process may use; choose device=cpu or mode=estimate"
    )


def _check_checkpoint(job: Job, spec: ModelSpec) -> str | None:
    if job.ckpt_dir is None:
        return None
    folder = Path(job.ckpt_dir)
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "does not exist"
        raise UsageError(
            f"ckpt_dir={job.ckpt_dir} {state}; give the official checkpoint folder of {spec.name}, "
            "or null for random weights"
        )
    return _inspected(folder, spec.name)


@functools.cache
def _inspected(folder: Path, model: str) -> str:
    """Fingerprint of a checkpoint folder; read once, however many jobs use it."""
    from wan21.weights.inspect import inspect_folder

    return inspect_folder(folder, model_spec(model)).fingerprint
