"""The flags of generate.py: the official ones with their defaults, a few more, and what they ask for, checked.

Everything that can be known to be wrong is refused here, before anything is loaded.

Reference: the command line of Wan2.1's generate.py.
"""

import argparse
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from wan21.errors import UsageError
from wan21.models import MODELS, ModelSpec, model_spec
from wan21.options import LOAD_STRATEGIES, PRECISIONS, Options
from wan21.parallel.layout import Layout, check_layout
from wan21.prompt.settings import LANGUAGES, METHODS, PromptExtension, make_prompt_extension
from wan21.request import SOLVERS, Request, make_request
from wan21.sources import Sources, frame_sources

TRUE_WORDS = ("yes", "true", "t", "y", "1")
FALSE_WORDS = ("no", "false", "f", "n", "0")
RANDOM = "random"
EXTENSION_FLAGS = ("prompt_extend_method", "prompt_extend_model", "prompt_extend_target_lang")


def truth(text: str) -> bool:
    """A truth value from its usual words, in any case."""
    word = text.lower()
    if word not in TRUE_WORDS + FALSE_WORDS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither of {', '.join(TRUE_WORDS + FALSE_WORDS)}")
    return word in TRUE_WORDS


def slices(text: str) -> int | Literal["auto"]:
    """Number of attention slices from "true", "false" or a number; "auto" lets the pipeline choose."""
    if text.lower() in TRUE_WORDS[:4]:
        return "auto"
    if text.lower() in FALSE_WORDS[:4]:
        return 1
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true, false nor a number of at least 1")
    return int(text)


def paths(text: str) -> tuple[str, ...]:
    """Paths with commas between them."""
    found = tuple(part.strip() for part in text.split(","))
    if not all(found):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty path in it; write PATH,PATH")
    return found


def parser() -> argparse.ArgumentParser:
    """All flags with their defaults and meanings."""
    flags = argparse.ArgumentParser(prog="generate.py", description="Generate a video or an image with Wan2.1.")
    _add_task(flags)
    _add_sources(flags)
    _add_extension(flags)
    _add_sampling(flags)
    _add_machine(flags)
    return flags


def _add_task(flags: argparse.ArgumentParser) -> None:
    add = flags.add_argument_group("what to make").add_argument
    add("--task", choices=tuple(MODELS), default="t2v-14B", help="model and task")
    add("--size", help="WIDTH*HEIGHT in pixels; default: the task's. From a picture comes the ratio of sides")
    add("--frame_num", type=int, help="frames, of the form 4n+1; default: the task's")
    add("--prompt", help="what to show; default: an example")
    add("--base_seed", type=int, default=-1, help="seed of the noise; a negative one draws one and prints it")
    add("--save_file", type=Path, help="where to write; default: a name made of task, size, prompt and time")


def _add_sources(flags: argparse.ArgumentParser) -> None:
    add = flags.add_argument_group("what to make it from").add_argument
    add("--image", help="i2v: the first frame; default: a built-in example")
    add("--first_frame", help="flf2v: the first frame; both or neither, which takes built-in examples")
    add("--last_frame", help="flf2v: the last frame")
    add("--src_video", help="vace: the video that is edited, or that controls")
    add("--src_mask", help="vace: where the video is to change, white; with --src_video")
    add("--src_ref_images", type=paths, default=(), help="vace: pictures of what is to appear, with commas between")
    add("--vace_context_scale", type=float, default=1.0, help="vace: how strongly these files steer")


def _add_extension(flags: argparse.ArgumentParser) -> None:
    add = flags.add_argument_group("a language model that writes the prompt out").add_argument
    add("--use_prompt_extend", action="store_true", help="have the prompt written out in full first")
    add("--prompt_extend_method", choices=METHODS, default="local_qwen", help="on this machine, or by a service")
    add("--prompt_extend_model", help="a short name such as Qwen2.5_7B, a folder, a repository, or the service's name")
    add("--prompt_extend_target_lang", choices=LANGUAGES, default="zh", help="language of the extended prompt")


def _add_sampling(flags: argparse.ArgumentParser) -> None:
    add = flags.add_argument_group("how to sample").add_argument
    add("--sample_solver", choices=SOLVERS, default="unipc", help="the sampler")
    add("--sample_steps", type=int, help="denoising steps; default: the task's")
    add("--sample_shift", type=float, help="shift of the noise schedule; default: the task's")
    add("--sample_guide_scale", type=float, help="classifier-free guidance; 1 switches it off; default: the task's")
    add("--upstream_quirks", action="store_true", help="do as the official code does where that is a mistake")


def _add_machine(flags: argparse.ArgumentParser) -> None:
    add = flags.add_argument_group("how to run").add_argument
    add("--ckpt_dir", required=True, help=f'official checkpoint folder, or "{RANDOM}" for seeded random weights')
    add("--device", default=None, help="cuda, cuda:N or cpu; default: the GPU if there is one")
    add("--precision", choices=PRECISIONS, default="bf16", help="number format of the DiT")
    add("--offload_model", type=truth, default=True, help="components leave the device when not needed (true)")
    add("--load_strategy", choices=LOAD_STRATEGIES, default="full", help="block and part stream weights from host")
    add("--attention_slicing", type=slices, default=1, help="true, false or a number of slices")
    add("--gradient_checkpointing", action="store_true", help="recompute blocks where gradients are kept")
    add("--t5_cpu", action="store_true", help="run the text encoder on the CPU")
    add("--ulysses_size", type=int, default=1, help="ranks that share the heads of attention; start them with torchrun")
    add("--ring_size", type=int, default=1, help="ranks that pass keys and values around")
    add("--cfg_parallel", action="store_true", help="the two passes of guidance on two halves of the ranks")
    add("--t5_fsdp", action="store_true", help="shard the text encoder's weights over the ranks")
    add("--dit_fsdp", action="store_true", help="shard the DiT's weights over the ranks")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the flags ask for, checked.

    extension: who extends the prompt; None where nobody does.
    path: where to write; None for a name that is made of the prompt.
    idle: flags that are given and change nothing, each with the reason.
    """

    spec: ModelSpec
    request: Request
    options: Options
    extension: PromptExtension | None
    path: Path | None
    device: str | None
    idle: dict[str, str]


def asked(flags: argparse.Namespace) -> Asked:
    """What the flags ask for.

    Raises:
        UsageError: a value that cannot be, or a flag of another task.
        MissingPackageError: a choice needs a package that is not installed.
    """
    spec = model_spec(flags.task)
    request = make_request(
        spec,
        seed=flags.base_seed if flags.base_seed >= 0 else secrets.randbelow(2**63),
        prompt=flags.prompt,
        size=flags.size,
        frame_num=flags.frame_num,
        solver=flags.sample_solver,
        num_steps=flags.sample_steps,
        shift=flags.sample_shift,
        guide_scale=flags.sample_guide_scale,
        sources=Sources(
            image=flags.image,
            first_frame=flags.first_frame,
            last_frame=flags.last_frame,
            src_video=flags.src_video,
            src_mask=flags.src_mask,
            src_ref_images=flags.src_ref_images,
        ),
        vace_context_scale=flags.vace_context_scale,
        upstream_quirks=flags.upstream_quirks,
    )
    options = Options(
        precision=flags.precision,
        offload=flags.offload_model,
        load_strategy=flags.load_strategy,
        t5_cpu=flags.t5_cpu,
        attention_slices=flags.attention_slicing,
        gradient_checkpointing=flags.gradient_checkpointing,
        ckpt_dir=None if flags.ckpt_dir == RANDOM else flags.ckpt_dir,
        layout=Layout(
            ulysses=flags.ulysses_size,
            ring=flags.ring_size,
            cfg=2 if flags.cfg_parallel else 1,
            dit_fsdp=flags.dit_fsdp,
            t5_fsdp=flags.t5_fsdp,
        ),
    )
    check_layout(options.layout, spec, request)
    extension, idle = _extension(flags, spec)
    _check_place(flags.save_file, spec)
    return Asked(
        spec=spec,
        request=request,
        options=options,
        extension=extension,
        path=flags.save_file,
        device=flags.device,
        idle=idle,
    )


def _extension(flags: argparse.Namespace, spec: ModelSpec) -> tuple[PromptExtension | None, dict[str, str]]:
    """Who extends the prompt, and the flags of it that are given in vain."""
    if not flags.use_prompt_extend:
        given = (name for name in EXTENSION_FLAGS if getattr(flags, name) != parser().get_default(name))
        return None, dict.fromkeys(given, "use_prompt_extend is not given")
    extension = make_prompt_extension(
        method=flags.prompt_extend_method,
        model=flags.prompt_extend_model,
        target_lang=flags.prompt_extend_target_lang,
        has_pictures=bool(frame_sources(spec)),
    )
    return extension, {}


def suffix_of(spec: ModelSpec) -> str:
    """How the name of a file that the task writes ends."""
    return ".png" if spec.is_image else ".mp4"


def _check_place(path: Path | None, spec: ModelSpec) -> None:
    """Refuses a place that cannot be written, or a name that belongs to another kind of file."""
    folder, suffix = Path() if path is None else path.parent, suffix_of(spec)
    if path is not None and path.suffix.lower() != suffix:
        raise UsageError(f"save_file={path} does not end in {suffix}, which {spec.name} writes; rename it")
    if path is not None and path.is_dir():
        raise UsageError(f"save_file={path} is a folder; give the name of a file")
    if not folder.is_dir():
        raise UsageError(f"save_file={path}: the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise UsageError(f"save_file={path}: the folder {folder.absolute()} cannot be written; choose another")
