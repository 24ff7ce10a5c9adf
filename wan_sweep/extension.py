"""A job's prompt extension, as the worker runs it and as the record tells of it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from wan_sweep.build import build_extension, build_spec

if TYPE_CHECKING:
    from wan21.events import Observer
    from wan21.parallel.world import World
    from wan21.prompt.settings import PromptExtension
    from wan21.request import Request
    from wan21.runtime import Runtime
    from wan_sweep.schema import Job

NOT_EXTENDED = "prompt_not_extended"


def extend(
    job: "Job", request: "Request", runtime: "Runtime", observer: "Observer", world: "World"
) -> tuple["Request", dict[str, str] | None]:
    """The request with its prompt extended if the job asks for that, and what the record says of it.

    Of several processes the first extends it for all; the others wait for what it comes to, and have nothing to say.

    Returns:
        The request, and for the record `prompt`, `original`, `method`, `model`, `target_lang`, and where the original
        prompt was kept `problem` and `advice`; None where no extension was asked for, or another process tells of it.
    """
    extension = build_extension(job)
    if extension is None:
        return request, None
    from wan21.parallel.exchange import agreed_text

    told = _extended(job, request, extension, runtime, observer) if world.rank == 0 else None
    prompt = request.prompt if told is None else told["prompt"]
    return replace(request, prompt=agreed_text(world.everyone, prompt, runtime.device)), told


def _extended(
    job: "Job", request: "Request", extension: "PromptExtension", runtime: "Runtime", observer: "Observer"
) -> dict[str, str]:
    from wan21.prompt.extend import extend_prompt
    from wan21.sources import read_frames

    spec = build_spec(job)
    extended = extend_prompt(
        request.prompt,
        extension,
        pictures=read_frames(spec, request.sources, request.shape),
        is_image=spec.is_image,
        seed=request.seed,
        runtime=runtime,
        observer=observer,
    )
    told = {
        "prompt": extended.prompt,
        "original": extended.original,
        "method": extension.method,
        "model": extension.model,
        "target_lang": extension.target_lang,
    }
    if extended.problem:
        told |= {"problem": extended.problem, "advice": extended.advice}
    return told


def extension_warnings(told: Mapping[str, str] | None) -> list[dict[str, str]]:
    """A warning if an extension was asked for and the original prompt was kept."""
    if told is None or "problem" not in told:
        return []
    text = f"the prompt was not extended, so the job ran with the original one: {told['problem']}"
    return [
        {"code": NOT_EXTENDED, "text": text, "advice": f"{told['advice']}; then run the job again with resume=false"}
    ]
