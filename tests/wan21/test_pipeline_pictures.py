"""Image to video and first-last frame on the tiny models: each option keeps its promise, pictures to file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from wan21.assets import Assets, open_assets
from wan21.errors import CheckpointError
from wan21.events import SILENT, Observer, Span
from wan21.frames import save_video
from wan21.models import MODELS, ModelSpec
from wan21.options import Options
from wan21.pipeline import Generation, VideoPipeline
from wan21.request import Request, make_request
from wan21.runtime import CpuRuntime
from wan21.sources import Sources
from wan21.weights.inspect import CLIP_FILE, inspect_folder
from wan21.weights.random import RandomWeights
from wan21.weights.write import write_folder

I2V, FLF2V = MODELS["tiny-i2v"], MODELS["tiny-flf2v"]
SAME_ROUNDING = 1e-4  # relative, after all steps: the same sums in float32 over other tile shapes


class Listener:
    """Remembers what it hears, and the bytes that stood and peaked at the end of each span."""

    wants_blocks = False

    def __init__(self, runtime: CpuRuntime | None = None) -> None:
        self.runtime = runtime
        self.heard: list[tuple[str, str]] = []
        self.expected: dict[str, list[int | None]] = {}
        self.peaks: dict[str, int] = {}
        self.moved: list[tuple[str, int]] = []
        """What a component's load or release changed in the device's bytes."""

    @contextmanager
    def span(self, span: Span) -> Iterator[None]:
        self.heard.append((span.kind, span.name))
        if span.kind == "component":
            self.expected.setdefault(span.name, []).append(span.expected_bytes)
        before = 0
        if self.runtime is not None:
            before = self.runtime.memory().allocated_bytes
            self.runtime.reset_memory_peaks()
        yield
        if self.runtime is not None:
            memory = self.runtime.memory()
            self.peaks[span.name] = max(memory.allocated_peak_bytes, self.peaks.get(span.name, 0))
            if span.kind in {"component", "release"}:
                self.moved.append((span.name, memory.allocated_bytes - before))

    def told(self, *kinds: str) -> list[str]:
        return [name for kind, name in self.heard if kind in kinds]


def request(spec: ModelSpec = I2V, **changes: Any) -> Request:
    settings: dict[str, Any] = {"seed": 7, "size": "96*64", "frame_num": 5, "num_steps": 2}
    return make_request(spec, **(settings | changes))


def generate(
    spec: ModelSpec = I2V,
    asked: Request | None = None,
    *,
    observer: Observer = SILENT,
    runtime: CpuRuntime | None = None,
    **options: Any,
) -> Generation:
    chosen = Options(**({"precision": "fp32", "clip_precision": "fp32"} | options))
    runtime = runtime or CpuRuntime()
    assets = open_assets(spec, chosen, runtime)
    return VideoPipeline(spec, chosen, assets, runtime, observer).generate(asked or request(spec))


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture(scope="module", params=[I2V, FLF2V], ids=["i2v", "flf2v"])
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    return request.param


@pytest.fixture(scope="module")
def plain(spec: ModelSpec) -> Generation:
    return generate(spec)


def save(path: Path, width: int, height: int, seed: int = 0) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.mark.parametrize(
    "options",
    [
        {"offload": True},
        {"load_strategy": "block"},
        {"load_strategy": "part", "offload": True, "resident_gib": 0.002},
        {"load_strategy": "part", "t5_cpu": True},
        {"gradient_checkpointing": True},
    ],
)
def test_where_weights_live_changes_no_bit(spec: ModelSpec, plain: Generation, options: dict[str, Any]) -> None:
    generation = generate(spec, **options)
    assert torch.equal(generation.latents, plain.latents)
    assert torch.equal(generation.videos[0], plain.videos[0])


@pytest.mark.parametrize(
    "options", [{"attention_slices": 2}, {"rows_at_once": 64}, {"residual_on_host": 0.5, "rows_at_once": 32}]
)
def test_pieces_change_no_more_than_rounding(spec: ModelSpec, plain: Generation, options: dict[str, Any]) -> None:
    assert relative_l2(generate(spec, **options).latents, plain.latents) < SAME_ROUNDING


def test_half_precision_gives_nearly_the_same_latents(spec: ModelSpec, plain: Generation) -> None:
    half = generate(spec, precision="bf16", clip_precision="fp16")
    assert 0 < relative_l2(half.latents, plain.latents) < 0.05  # rounding of every block, amplified by guidance


def test_videos_of_a_batch_share_the_pictures(spec: ModelSpec, plain: Generation) -> None:
    batch = generate(spec, request(spec, batch_size=2, micro_batch_size=2))
    assert relative_l2(batch.latents[:1], plain.latents) < SAME_ROUNDING
    assert relative_l2(batch.latents[1:], generate(spec, request(spec, seed=8)).latents) < SAME_ROUNDING


@pytest.mark.parametrize("num_frames", [5, 9, 13])
def test_first_and_last_frame_work_with_any_number_of_frames(num_frames: int) -> None:
    generation = generate(FLF2V, request(FLF2V, frame_num=num_frames, num_steps=1))
    assert tuple(generation.videos[0].shape) == (num_frames, 64, 96, 3)


def test_every_picture_decides_over_the_video(tmp_path: Path) -> None:
    one, other = save(tmp_path / "a.png", 96, 64), save(tmp_path / "b.png", 130, 64, seed=1)

    def made(**changes: Any) -> torch.Tensor:
        return generate(FLF2V, request(FLF2V, num_steps=1, **changes)).latents

    first = made(sources=Sources(first_frame=one, last_frame=one))
    second = made(sources=Sources(first_frame=one, last_frame=other))
    quirk = made(sources=Sources(first_frame=one, last_frame=other), upstream_quirks=True)
    assert relative_l2(second, first) > 0.01
    assert relative_l2(quirk, second) > 0.01
    same = made(sources=Sources(first_frame=one, last_frame=one), upstream_quirks=True)
    assert torch.equal(same, first)  # one step has no older slope, which the sampler would round


def test_the_samplers_quirk_is_upstreams_where_it_steps_on_the_gpu() -> None:
    def made(**options: Any) -> torch.Tensor:
        return generate(I2V, request(num_steps=3, upstream_quirks=True), **options).latents

    plain = generate(I2V, request(num_steps=3)).latents
    assert 0 < relative_l2(made(), plain) < 0.01
    assert torch.equal(made(offload=True), plain)


def test_phases_come_in_order_and_components_leave_with_them() -> None:
    listener = Listener()
    generate(observer=listener, offload=True)
    assert listener.told("component", "release") == [
        "t5",
        "t5",
        "clip",
        "clip",
        "vae",
        "vae",
        "dit",
        "dit",
        "vae",
        "vae",
    ]
    phases = ["encode_text", "encode_image", "encode_image", "denoise", "decode"]
    assert [name for phase in phases for name in ("load", phase)] == listener.told("phase")
    stays = Listener()
    generate(observer=stays)
    assert stays.told("component", "release") == ["t5", "clip", "dit", "vae"]
    assert stays.told("phase") == ["load", *phases]


def test_the_vae_brings_its_encoder_only_where_something_is_encoded() -> None:
    with_pictures, without, offloaded = Listener(), Listener(), Listener()
    generate(observer=with_pictures)
    tiny = MODELS["tiny"]
    generate(tiny, observer=without)
    generate(observer=offloaded, offload=True)
    (whole,), (decoder,) = with_pictures.expected["vae"], without.expected["vae"]
    assert isinstance(whole, int)
    assert isinstance(decoder, int)
    assert 0.5 * whole < decoder < 0.7 * whole
    assert offloaded.expected["vae"] == [whole, decoder]


@pytest.mark.parametrize("model", ["tiny", "tiny-i2v", "tiny-vace"])
def test_all_that_a_load_brings_has_left_when_its_release_ends(model: str) -> None:
    runtime = CpuRuntime()
    listener = Listener(runtime)
    with runtime.counting():
        generate(MODELS[model], request(MODELS[model], num_steps=1), observer=listener, runtime=runtime, offload=True)
    loads, releases = listener.moved[::2], listener.moved[1::2]
    assert [name for name, _ in loads][-1] == "vae"
    assert releases == [(name, -num_bytes) for name, num_bytes in loads]


def test_clip_leaves_the_device_before_the_vae_comes() -> None:
    runtime = CpuRuntime()
    listener = Listener(runtime)
    with runtime.counting():
        generate(observer=listener, runtime=runtime, offload=True)
        at_once = Listener(runtime)
        generate(observer=at_once, runtime=runtime)
    (clip,) = listener.expected["clip"]
    assert isinstance(clip, int)
    assert listener.peaks["encode_image"] + clip < at_once.peaks["encode_image"]


def test_streaming_clip_takes_fewer_bytes() -> None:
    whole, blocks, parts = Listener(), Listener(), Listener()
    for listener, strategy in ((whole, "full"), (blocks, "block"), (parts, "part")):
        generate(observer=listener, load_strategy=strategy, asked=request(num_steps=1))
    sizes = [listener.expected["clip"][0] for listener in (whole, blocks, parts)]
    assert all(isinstance(size, int) for size in sizes)
    assert sizes[0] > sizes[1] > sizes[2]  # type: ignore[operator]


@pytest.fixture(scope="module")
def folder(spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(spec.name) / "folder"
    write_folder(path, spec, RandomWeights(spec, 0, CpuRuntime().generator))
    return path


def test_a_folder_in_the_official_layout_gives_the_same_bits(spec: ModelSpec, folder: Path) -> None:
    facts = inspect_folder(folder, spec)
    assert spec.task == facts.kind
    assert facts.clip_file == folder / CLIP_FILE
    assert facts.stored_dtypes["clip"] == ("F32",)
    random = RandomWeights(spec, 0, CpuRuntime().generator)
    options = Options(precision="fp32", t5_precision="bf16", offload=True)
    runtime = CpuRuntime()
    opened = open_assets(spec, replace(options, ckpt_dir=str(folder)), runtime)
    assert opened.description.startswith("checkpoint")
    drawn = Assets(random, opened.tokenizer, "random")
    one, other = (
        VideoPipeline(spec, options, assets, runtime).generate(request(spec, num_steps=1)) for assets in (opened, drawn)
    )
    assert torch.equal(one.latents, other.latents)


def test_a_folder_without_clip_or_of_another_task_is_refused(spec: ModelSpec, folder: Path) -> None:
    for other in (MODELS["tiny"], FLF2V if spec is I2V else I2V):
        with pytest.raises(CheckpointError, match=rf"holds {spec.task} .* choose model={spec.name}"):
            inspect_folder(folder, other)
    kept = (folder / CLIP_FILE).read_bytes()
    before = inspect_folder(folder, spec).fingerprint
    try:
        (folder / CLIP_FILE).unlink()
        with pytest.raises(CheckpointError, match=f"lacks {CLIP_FILE}"):
            inspect_folder(folder, spec)
        torch.save({"visual.cls_embedding": torch.zeros(1, 1, 64)}, folder / CLIP_FILE)
        assert inspect_folder(folder, spec).fingerprint != before
        with pytest.raises(CheckpointError, match="do not fit ImageEncoder; missing"):
            generate(spec, ckpt_dir=str(folder))
    finally:
        (folder / CLIP_FILE).write_bytes(kept)


def test_from_picture_files_to_an_mp4(spec: ModelSpec, tmp_path: Path) -> None:
    names = ("image",) if spec is I2V else ("first_frame", "last_frame")
    files = {name: save(tmp_path / f"{name}.jpg", 70, 100, seed) for seed, name in enumerate(names)}
    (video,) = generate(spec, request(spec, sources=Sources(**files), num_steps=1)).videos
    assert tuple(video.shape) == (5, 80, 64, 3)
    save_video(video, tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").stat().st_size > 1000
