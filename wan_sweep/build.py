"""From a job to what wan21 takes: the one place where knobs get their meaning."""

from typing import Literal, cast

from wan21.layout import Layout
from wan21.models import ModelSpec, model_spec
from wan21.options import AttentionKernel, Kernels, Options
from wan21.prompt.settings import PromptExtension, make_prompt_extension
from wan21.request import Request, make_request
from wan21.sources import Sources, frame_sources
from wan_sweep.schema import Job


def build_spec(job: Job) -> ModelSpec:
    """The task of a resolved job."""
    return model_spec(job.model)


def build_request(job: Job) -> Request:
    """What to generate.

    Raises:
        UsageError: a value that the task cannot do.
    """
    return make_request(
        build_spec(job),
        seed=job.base_seed,
        prompt=job.prompt,
        size=job.size,
        frame_num=job.frame_num,
        solver=job.sample_solver,
        num_steps=job.sample_steps,
        shift=job.sample_shift,
        guide_scale=job.sample_guide_scale,
        batch_size=job.batch_size,
        micro_batch_size=job.micro_batch_size,
        sources=build_sources(job),
        vace_context_scale=job.vace_context_scale,
        upstream_quirks=job.upstream_quirks,
    )


def build_sources(job: Job) -> Sources:
    """The files to make it from."""
    return Sources(
        image=job.image,
        first_frame=job.first_frame,
        last_frame=job.last_frame,
        src_video=job.src_video,
        src_mask=job.src_mask,
        src_ref_images=tuple(filter(None, (job.src_ref_images or "").split(","))),
    )


def build_extension(job: Job) -> PromptExtension | None:
    """Who extends the prompt; None where nobody does.

    Raises:
        UsageError: an impossible value, or no key for the service.
        MissingPackageError: a local model without the package that runs it.
    """
    if not job.use_prompt_extend:
        return None
    return make_prompt_extension(
        method=job.prompt_extend_method,
        model=job.prompt_extend_model,
        target_lang=job.prompt_extend_target_lang,
        has_pictures=bool(frame_sources(build_spec(job))),
    )


def build_layout(job: Job) -> Layout:
    """How it is spread over ranks."""
    return Layout(
        ulysses=job.ulysses_size,
        ring=job.ring_size,
        cfg=2 if job.cfg_parallel else 1,
        dit_fsdp=job.dit_fsdp,
        t5_fsdp=job.t5_fsdp,
    )


def build_options(job: Job) -> Options:
    """How to run it.

    Raises:
        UsageError: an impossible number of attention slices.
    """
    slices: int | Literal["auto"]
    if isinstance(job.attention_slicing, bool):
        slices = "auto" if job.attention_slicing else 1
    else:
        slices = job.attention_slicing
    return Options(
        precision=job.precision,
        t5_precision=job.t5_precision,
        clip_precision=job.clip_precision,
        vae_precision=job.vae_precision,
        offload=job.offload,
        load_strategy=job.load_strategy,
        t5_cpu=job.t5_cpu,
        kernels=cast("Kernels", job.kernels),
        attention_kernel=cast("AttentionKernel", job.attention_kernel),
        linear_format=job.linear_format,
        attention_slices=slices,
        resident_gib=job.resident_gib,
        host_budget_gib=job.host_budget_gib,
        rows_at_once=job.rows_at_once,
        share_first_attention=job.share_first_attention,
        residual_on_host=job.residual_on_host,
        vae_budget_gib=cast("float | None", job.vae_budget_gib),  # `rules.resolve` has made a number of "auto"
        gradient_checkpointing=job.gradient_checkpointing,
        ckpt_dir=job.ckpt_dir,
        weights_seed=job.weights_seed,
        layout=build_layout(job),
    )
