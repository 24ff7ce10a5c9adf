"""What to generate: the settings of one generation, checked against its task. No torch in here."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

from wan21.errors import UsageError, one_of
from wan21.excerpts import choose_excerpt
from wan21.models import ModelSpec
from wan21.pictures import picture_size
from wan21.shapes import TEMPORAL_STRIDE, VideoShape, parse_size, sides_like
from wan21.sources import NO_SOURCES, Sources, check_sources

Solver = Literal["unipc", "dpm++"]
SOLVERS: tuple[str, ...] = get_args(Solver)

NUM_TRAIN_TIMESTEPS = 1000
EXAMPLE_PROMPT = "A red paper kite climbs over a windy harbour while fishing boats rock at their moorings."


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
