"""Every task on the command line: from a folder in the official layout and files of our own to a file."""

import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image

from tests.wan21.fake_dashscope import ANSWER, GOOD_KEY, FakeDashScope, serving
from wan21.examples import example_picture
from wan21.flags import asked, parser
from wan21.frames import save_video
from wan21.generate import main
from wan21.models import MODELS, ModelSpec
from wan21.sources import TASK_SOURCES

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_tiny_checkpoint.py"
TINY = [spec for spec in MODELS.values() if spec.name.startswith("tiny")]
QUICK = ["--device", "cpu", "--size", "96*64", "--sample_steps", "1", "--base_seed", "3"]
NUM_FRAMES = 9


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A file for each flag that takes one."""
    folder = tmp_path_factory.mktemp("sources")
    frames = [example_picture(96, 64, progress=index / (NUM_FRAMES - 1)) for index in range(NUM_FRAMES)]
    for name, frame in (("first.png", frames[0]), ("last.jpg", frames[-1]), ("kite.webp", frames[4])):
        Image.fromarray(frame).save(folder / name)
    save_video(torch.from_numpy(np.stack(frames)), folder / "video.mp4")
    mask = np.zeros((NUM_FRAMES, 64, 96, 3), np.uint8)
    mask[:, :, 48:] = 255
    save_video(torch.from_numpy(mask), folder / "mask.mp4")
    return {
        "image": str(folder / "first.png"),
        "first_frame": str(folder / "first.png"),
        "last_frame": str(folder / "last.jpg"),
        "src_video": str(folder / "video.mp4"),
        "src_mask": str(folder / "mask.mp4"),
        "src_ref_images": f"{folder / 'kite.webp'},{folder / 'first.png'}",
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders in the official layout, by task, as the script makes them."""
    base = tmp_path_factory.mktemp("checkpoints")
    make = runpy.run_path(str(SCRIPT))["main"]
    arguments = sys.argv
    try:
        for spec in TINY:
            sys.argv = ["make_tiny_checkpoint.py", str(base / spec.name), "--model", spec.name]
            assert make() == 0
    finally:
        sys.argv = arguments
    return {spec.name: base / spec.name for spec in TINY}


def flags_for(spec: ModelSpec, files: dict[str, str]) -> list[str]:
    """All flags with files that a task takes."""
    return [word for name in TASK_SOURCES.get(spec.task, ()) for word in (f"--{name}", files[name])]


def made(flags: list[str]) -> np.ndarray:
    """What the command line made, [T, H, W, 3] in the shape that was asked for."""
    assert main(flags) == 0
    want = asked(parser().parse_args(flags))
    assert want.path is not None
    shape = (want.request.shape.num_frames, want.request.shape.height, want.request.shape.width, 3)
    decode = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(want.path)]
    raw = subprocess.run([*decode, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], check=True, capture_output=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(shape)


@pytest.mark.parametrize("spec", TINY, ids=lambda spec: spec.name)
def test_a_task_runs_from_its_folder_and_files_to_a_file(
    spec: ModelSpec, checkpoints: dict[str, Path], sources: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / f"out{'.png' if spec.is_image else '.mp4'}"
    flags = ["--task", spec.name, "--ckpt_dir", str(checkpoints[spec.name]), "--prompt", "a kite"]
    frames = made([*QUICK, *flags, *flags_for(spec, sources), "--save_file", str(out)])
    assert len(frames) == (1 if spec.is_image else NUM_FRAMES)
    assert frames.std() > 5
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("spec", [spec for spec in TINY if spec.task in {"i2v", "flf2v"}], ids=lambda spec: spec.name)
def test_another_picture_makes_another_video(spec: ModelSpec, sources: dict[str, str], tmp_path: Path) -> None:
    red = tmp_path / "red.png"
    Image.new("RGB", (96, 64), "red").save(red)
    videos = []
    for name, files in (("ours", sources), ("red", dict.fromkeys(sources, str(red)))):
        out = tmp_path / f"{name}.mp4"
        flags = ["--task", spec.name, "--ckpt_dir", "random", *flags_for(spec, files), "--save_file", str(out)]
        videos.append(made([*QUICK, *flags]))
    assert not np.array_equal(*videos)


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr("wan21.pipeline.VideoPipeline.generate", fail)
    monkeypatch.setattr("wan21.assets.open_assets", fail)


FOREIGN = [
    pytest.param(spec, name, id=f"{spec.name}-{name}")
    for spec in TINY
    for task, names in TASK_SOURCES.items()
    for name in names
    if task != spec.task
]


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(("spec", "name"), FOREIGN)
def test_the_flags_of_other_tasks_are_refused_by_name(
    spec: ModelSpec, name: str, sources: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUICK, "--task", spec.name, "--ckpt_dir", "random", f"--{name}", sources[name]]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"{name}={sources[name]} belongs to the" in message
    assert spec.name in message


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--task", "tiny-i2v", "--image", "{text}"], "image={text} is no picture"),
        (["--task", "tiny-i2v", "--image", "{empty}"], "image={empty} is no picture"),
        (["--task", "tiny-i2v", "--image", "/nowhere.png"], "image=/nowhere.png does not exist"),
        (["--task", "tiny-flf2v", "--first_frame", "{image}"], "needs last_frame as well"),
        (["--task", "tiny-flf2v", "--last_frame", "{image}"], "needs first_frame as well"),
        (["--task", "tiny-vace", "--src_mask", "{video}"], "src_mask={video} needs src_video as well"),
        (["--task", "tiny-vace", "--src_video", "{text}"], "src_video={text}"),
        (["--task", "tiny-vace", "--src_ref_images", "{image},{text}"], "src_ref_images={text} is no picture"),
        (["--task", "tiny-i2v", "--vace_context_scale", "2"], "vace_context_scale=2.0 belongs to the vace models"),
        (["--task", "tiny-t2i", "--frame_num", "5"], "frame_num=5 cannot be: tiny-t2i makes one image"),
        (["--task", "tiny-i2v", "--frame_num", "6"], "frame_num=6 is not of the form 4n+1"),
        (["--task", "t2v-1.3B", "--size", "1280*720"], "size=1280*720 is not a size of t2v-1.3B"),
        (["--task", "t2i-14B", "--save_file", "out.mp4"], "does not end in .png"),
        (["--task", "tiny", "--sample_shift", "0"], "sample_shift=0"),
        (["--task", "tiny", "--sample_shift", "nan"], "sample_shift=nan"),
        (["--task", "tiny", "--sample_guide_scale", "-1"], "sample_guide_scale=-1"),
        (["--task", "tiny", "--sample_steps", "1001"], "sample_steps=1001"),
        (["--task", "tiny", "--save_file", "."], "does not end in .mp4"),
        (
            ["--task", "tiny-i2v", "--use_prompt_extend", "--prompt_extend_model", "Qwen2.5_3B"],
            "prompt_extend_model=Qwen2.5_3B sees no pictures",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(
    flags: list[str], words: str, sources: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, empty = tmp_path / "text.png", tmp_path / "empty.jpg"
    text.write_text("no picture")
    empty.touch()
    names = {"text": text, "empty": empty, "image": sources["image"], "video": sources["src_video"]}
    assert main(["--device", "cpu", "--ckpt_dir", "random", *(flag.format(**names) for flag in flags)]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert words.format(**names) in message


@pytest.mark.usefixtures("nothing_loads")
def test_a_task_without_a_size_takes_one_of_its_own() -> None:
    for spec in MODELS.values():
        want = asked(parser().parse_args(["--task", spec.name, "--ckpt_dir", "random"]))
        assert want.request.size in spec.sizes
        assert want.request.shape.num_frames == spec.default_frame_num
    assert asked(parser().parse_args(["--task", "t2v-1.3B", "--ckpt_dir", "x"])).request.size == "832*480"


def test_shift_and_steps_of_image_to_video_follow_task_and_size() -> None:
    for size, shift in (("832*480", 3.0), ("480*832", 3.0), ("1280*720", 5.0)):
        want = asked(parser().parse_args(["--task", "i2v-14B", "--ckpt_dir", "x", "--size", size]))
        assert (want.request.shift, want.request.num_steps) == (shift, 40)
    want = asked(parser().parse_args(["--task", "flf2v-14B", "--ckpt_dir", "x"]))
    assert (want.request.shift, want.request.num_steps, want.request.guide_scale) == (16.0, 50, 5.0)


def test_a_seed_is_drawn_and_told_unless_one_is_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wan21.flags.secrets.randbelow", lambda limit: min(limit - 1, 4711))
    flags = ["--task", "tiny-t2i", "--ckpt_dir", "random", "--device", "cpu", "--size", "96*64", "--sample_steps", "1"]
    assert main([*flags, "--save_file", str(tmp_path / "out.png")]) == 0
    assert "seed 4711" in capsys.readouterr().out


def test_without_a_name_the_file_tells_task_size_and_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = ["--task", "tiny-t2i", "--ckpt_dir", "random", "--prompt", "a/b *red* kite: 风筝 " + "x" * 99]
    assert main([*QUICK, *flags]) == 0
    (out,) = tmp_path.iterdir()
    assert out.name.startswith("tiny-t2i_96x64_1_1_a_b__red__kite__风筝_xxx")
    assert out.suffix == ".png"
    assert len(out.name) < 100


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDashScope]:
    with serving() as fake:
        monkeypatch.setenv("DASH_API_URL", fake.url)
        monkeypatch.setenv("DASH_API_KEY", GOOD_KEY)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield fake


@pytest.mark.parametrize("status", [200, 400])
def test_an_extended_prompt_is_shown_and_names_the_file_and_a_failure_leaves_the_original(
    status: int,
    service: FakeDashScope,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    service.plan = [status]
    extend = ["--use_prompt_extend", "--prompt_extend_method", "dashscope", "--prompt_extend_target_lang", "en"]
    assert main([*QUICK, "--task", "tiny-t2i", "--ckpt_dir", "random", "--prompt", "[red] kite", *extend]) == 0
    shown = capsys.readouterr().out
    (out,) = tmp_path.iterdir()
    if status == 200:
        assert f"extended prompt: {ANSWER}" in shown
        assert "_1_1_A_red_paper_kite_climbs" in out.name
    else:
        assert "the prompt is not extended: DashScope refused: HTTP status 400" in shown
        assert "_1_1__red__kite_2" in out.name
    assert GOOD_KEY not in shown
    assert service.requests[0]["body"]["parameters"]["seed"] == 3


def test_flags_of_an_extension_that_is_not_asked_for_are_said_to_be_idle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--task", "tiny-t2i", "--ckpt_dir", "random", "--prompt_extend_target_lang", "en"]
    assert main([*QUICK, *flags, "--save_file", str(tmp_path / "out.png")]) == 0
    shown = capsys.readouterr().out
    assert "prompt_extend_target_lang changes nothing: use_prompt_extend is not given" in shown
    assert "prompt_extend_method" not in shown


def test_the_folder_of_another_task_is_refused_by_what_it_lacks(
    checkpoints: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--task", "tiny-i2v", "--ckpt_dir", str(checkpoints["tiny"]), "--save_file", str(tmp_path / "out.mp4")]
    assert main([*QUICK, *flags]) == 3
    assert "lacks models_clip_open-clip" in capsys.readouterr().err
