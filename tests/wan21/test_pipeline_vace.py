"""VACE on the tiny model: each option keeps its promise, every source decides over the video, files to file."""

import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.wan21.test_pipeline_pictures import SAME_ROUNDING, Listener, generate, relative_l2
from tests.wan21.test_videos import plain_frames
from wan21.control import load_control
from wan21.dit.model import Dit
from wan21.errors import CheckpointError, UsageError
from wan21.frames import save_image, save_video
from wan21.models import MODELS, ModelSpec
from wan21.pipeline import Generation
from wan21.request import Request, make_request
from wan21.runtime import CpuRuntime
from wan21.sources import Sources
from wan21.videos import inspect_video
from wan21.weights.inspect import inspect_folder
from wan21.weights.random import RandomWeights
from wan21.weights.write import write_folder

VACE = MODELS["tiny-vace"]
SIDES = (48, 80)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    folder = tmp_path_factory.mktemp("sources")
    save_video(plain_frames(5, *SIDES), folder / "video.mp4")
    mask = torch.zeros(5, *SIDES, 3, dtype=torch.uint8)
    mask[..., 20:60, :] = 255
    save_video(mask, folder / "mask.mp4")
    save_image(plain_frames(2, 30, 60)[1], folder / "picture.png")
    return Sources(
        src_video=str(folder / "video.mp4"),
        src_mask=str(folder / "mask.mp4"),
        src_ref_images=(str(folder / "picture.png"),),
    )


def request(sources: Sources, **changes: Any) -> Request:
    settings: dict[str, Any] = {"seed": 7, "size": "96*64", "frame_num": 5, "num_steps": 2, "sources": sources}
    return make_request(VACE, **(settings | changes))


def made(sources: Sources, asked: Request | None = None, **options: Any) -> Generation:
    return generate(VACE, asked or request(sources), **options)


@pytest.fixture(scope="module")
def plain(sources: Sources) -> Generation:
    return made(sources)


def test_the_video_has_the_source_s_shape_and_no_frame_of_the_references(plain: Generation) -> None:
    assert tuple(plain.videos[0].shape) == (5, *SIDES, 3)
    assert tuple(plain.latents.shape) == (1, 16, 2, 6, 10)
    assert plain.videos[0].float().std() > 5


@pytest.mark.parametrize(
    "options",
    [
        {"offload": True},
        {"load_strategy": "block"},
        {"load_strategy": "block", "resident_gib": 0.01},
        {"load_strategy": "part", "offload": True, "resident_gib": 0.002},
        {"load_strategy": "part", "t5_cpu": True},
        {"gradient_checkpointing": True},
    ],
)
def test_where_weights_live_changes_no_bit(sources: Sources, plain: Generation, options: dict[str, Any]) -> None:
    generation = made(sources, **options)
    assert torch.equal(generation.latents, plain.latents)
    assert torch.equal(generation.videos[0], plain.videos[0])


@pytest.mark.parametrize(
    "options",
    [
        {"attention_slices": 2},
        {"rows_at_once": 64},
        {"residual_on_host": 0.5, "rows_at_once": 32, "load_strategy": "part"},
        {"vae_budget_gib": 0.0042},
    ],
)
def test_pieces_change_no_more_than_rounding(sources: Sources, plain: Generation, options: dict[str, Any]) -> None:
    assert relative_l2(made(sources, **options).latents, plain.latents) < SAME_ROUNDING


def test_half_precision_gives_nearly_the_same_latents(sources: Sources, plain: Generation) -> None:
    assert 0 < relative_l2(made(sources, precision="bf16").latents, plain.latents) < 0.05


def test_videos_of_a_batch_share_the_sources(sources: Sources, plain: Generation) -> None:
    batch = made(sources, request(sources, batch_size=2, micro_batch_size=2))
    assert relative_l2(batch.latents[:1], plain.latents) < SAME_ROUNDING
    assert relative_l2(batch.latents[1:], made(sources, request(sources, seed=8)).latents) < SAME_ROUNDING


def test_every_source_and_the_scale_decide_over_the_video(sources: Sources, tmp_path: Path) -> None:
    save_video(plain_frames(5, *SIDES).flip(0), tmp_path / "other.mp4")
    asked = [
        request(sources),
        request(replace(sources, src_video=str(tmp_path / "other.mp4"))),
        request(replace(sources, src_mask=None)),
        request(replace(sources, src_ref_images=())),
        request(sources, vace_context_scale=0.5),
    ]
    latents = [made(sources, one).latents for one in asked]
    for one, other in itertools.combinations(latents, 2):
        assert relative_l2(one, other) > 1e-3


def test_without_sources_it_makes_a_video_of_the_size_asked_for() -> None:
    generation = made(Sources(), request(Sources(), frame_num=9, num_steps=1))
    assert tuple(generation.videos[0].shape) == (9, 64, 96, 3)


def test_more_references_make_more_tokens_and_the_same_number_of_frames(sources: Sources) -> None:
    three = replace(sources, src_ref_images=3 * sources.src_ref_images)
    asked = request(three, num_steps=1)
    assert asked.denoised_shape.grid == (asked.shape.grid[0] + 3, *asked.shape.grid[1:])
    assert tuple(made(three, asked).videos[0].shape) == (5, *SIDES, 3)


def test_sources_are_encoded_between_the_prompt_and_denoising() -> None:
    listener = Listener()
    made(Sources(), request(Sources()), observer=listener)
    assert listener.told("phase") == ["load", "encode_text", "encode_image", "denoise", "decode"]
    assert listener.told("component") == ["t5", "dit", "vae"]
    listener = Listener()
    made(Sources(), request(Sources()), observer=listener, offload=True)
    assert listener.told("component", "release") == ["t5", "t5", "vae", "vae", "dit", "dit", "vae", "vae"]
    whole, decoder = listener.expected["vae"]
    assert (whole or 0) > 1.5 * (decoder or 0)


def measured(**options: Any) -> Listener:
    runtime = CpuRuntime()
    listener = Listener(runtime)
    asked = request(Sources(), size="256*160", num_steps=1)
    with runtime.counting():
        made(Sources(), asked, observer=listener, runtime=runtime, offload=True, vae_precision="bf16", **options)
    return listener


def test_a_budget_of_the_vae_holds_for_encoding_too() -> None:
    whole, tiled = measured(), measured(vae_budget_gib=0.008)
    weights = whole.expected["vae"][0] or 0
    assert whole.peaks["encode_image"] - weights > 1.5 * 0.008 * 2**30
    # Kernels take a little room of their own, and the window of the video is given from outside.
    assert tiled.peaks["encode_image"] - weights < 1.25 * 0.008 * 2**30


@pytest.mark.parametrize("load_strategy", ["full", "block", "part"])
def test_random_weights_and_files_arrive_in_full(load_strategy: str, tmp_path: Path, sources: Sources) -> None:
    weights = RandomWeights(VACE, 0, CpuRuntime().generator)
    write_folder(tmp_path / "ckpt", VACE, weights, num_shards=2)
    facts = inspect_folder(tmp_path / "ckpt", VACE)
    assert (facts.kind, facts.dit) == ("vace", VACE.dit)
    asked = request(sources, num_steps=1)
    from_files = made(sources, asked, ckpt_dir=str(tmp_path / "ckpt"), load_strategy=load_strategy, t5_precision="bf16")
    assert relative_l2(from_files.latents, made(sources, asked).latents) < SAME_ROUNDING


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "ckpt", MODELS["tiny"], RandomWeights(MODELS["tiny"], 0, CpuRuntime().generator))
    with pytest.raises(CheckpointError, match=r"holds t2v with .*model=tiny-vace needs vace .*choose model=tiny"):
        inspect_folder(tmp_path / "ckpt", VACE)


def test_from_files_to_a_file(sources: Sources, tmp_path: Path) -> None:
    video = made(sources).videos[0]
    save_video(video, tmp_path / "made.mp4")
    facts = inspect_video("src_video", str(tmp_path / "made.mp4"))
    assert (facts.num_frames, facts.height, facts.width) == (5, *SIDES)


def test_the_example_sources_can_be_used(tmp_path: Path, repository: Path) -> None:
    command = [sys.executable, repository / "scripts" / "make_example_sources.py", tmp_path, "--size", "96*64"]
    told = subprocess.run([*command, "--frame_num", "5"], capture_output=True, text=True, check=True).stdout.split()
    paths = dict(knob.split("=") for knob in told)
    sources = Sources(**{**paths, "src_ref_images": (paths["src_ref_images"],)})  # type: ignore[arg-type]
    assert request(sources).denoised_shape.latent == (3, 8, 12)
    control = load_control(VACE, request(sources))
    assert control is not None
    assert control.mask is not None
    share = (control.mask > 127).float().mean().item()
    assert 0.05 < share < 0.15  # some of the picture may change, around the kite
    refused = subprocess.run([*command, "--frame_num", "6"], capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stderr.count("frame_num=6 is not of the form 4n+1")) == (2, 1)


def test_damaged_sources_are_refused_before_anything_loads(sources: Sources, tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    path.write_bytes(Path(str(sources.src_video)).read_bytes())
    asked = request(Sources(src_video=str(path)))
    path.write_bytes(b"damaged meanwhile")
    listener = Listener()
    with pytest.raises(UsageError, match=rf"src_video={path} is no video"):
        made(sources, asked, observer=listener)
    assert listener.heard == []


@pytest.mark.parametrize("spec", [MODELS["vace-1.3B"], MODELS["vace-14B"]], ids=lambda spec: spec.name)
def test_names_and_shapes_are_those_of_the_checkpoint(
    spec: ModelSpec, checkpoint_shapes: dict[str, dict[str, tuple[int, ...]]]
) -> None:
    with torch.device("meta"):
        model = Dit(spec.dit, dtype=torch.bfloat16)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == checkpoint_shapes[spec.name]
    assert (spec.default_shift, spec.default_steps, spec.default_frame_num) == (16.0, 50, 81)
