"""Files that a video is made from: refused by name, before anything is loaded, where they cannot be used."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from wan21.errors import UsageError
from wan21.examples import example_picture
from wan21.models import MODELS, ModelSpec
from wan21.options import Options, idle_knobs
from wan21.pictures import picture_size
from wan21.request import make_request
from wan21.sources import Sources, check_sources, described


def save(path: Path, width: int = 40, height: int = 30, seed: int = 0) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def refusal(model: str, **sources: Any) -> str:
    with pytest.raises(UsageError) as refused:
        make_request(MODELS[model], seed=0, sources=Sources(**sources))
    return str(refused.value)


@pytest.mark.parametrize(
    ("model", "name", "owner"),
    [
        ("tiny", "image", "i2v"),
        ("t2i-14B", "image", "i2v"),
        ("i2v-14B", "first_frame", "flf2v"),
        ("flf2v-14B", "image", "i2v"),
        ("i2v-14B", "src_video", "vace"),
        ("t2v-14B", "src_mask", "vace"),
    ],
)
def test_what_another_task_takes_is_refused_by_name(model: str, name: str, owner: str) -> None:
    message = refusal(model, **{name: "/nowhere.png"})
    assert message.startswith(f"{name}=/nowhere.png belongs to the {owner} models, and {model} takes")
    assert f"leave {name} out" in message


def test_reference_images_of_another_task_are_refused_together() -> None:
    assert refusal("t2v-14B", src_ref_images=("a.png", "b.png")).startswith("src_ref_images=a.png,b.png belongs to")


@pytest.mark.parametrize(("given", "absent"), [("first_frame", "last_frame"), ("last_frame", "first_frame")])
def test_one_frame_of_two_is_refused_and_not_replaced_by_an_example(tmp_path: Path, given: str, absent: str) -> None:
    path = save(tmp_path / "a.png")
    assert f"{given}={path} needs {absent} as well" in refusal("tiny-flf2v", **{given: path})


def test_a_file_that_does_not_exist_or_is_a_folder_is_named(tmp_path: Path) -> None:
    assert f"image={tmp_path}/no.png does not exist" in refusal("tiny-i2v", image=str(tmp_path / "no.png"))
    assert f"image={tmp_path} is not a file" in refusal("tiny-i2v", image=str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    assert f"image={path} is no picture that can be read" in refusal("tiny-i2v", image=str(path))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_picture_that_is_cut_short_is_named(tmp_path: Path, suffix: str) -> None:
    whole = Path(save(tmp_path / f"whole.{suffix}", 200, 200)).read_bytes()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(whole[: len(whole) // 2])
    assert f"image={path} is no picture that can be read" in refusal("tiny-i2v", image=str(path))


def test_a_picture_like_a_thread_is_refused_with_its_size(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", 4000, 2)
    message = refusal("i2v-14B", image=path)
    assert message.startswith(f"image={path}: a picture of 4000*2 pixels is too long and narrow")


def test_a_file_that_changes_is_looked_at_again(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", 40, 30)
    assert picture_size("image", path) == (40, 30)
    before = Sources(image=path).fingerprints()
    save(tmp_path / "a.png", 52, 30)
    assert picture_size("image", path) == (52, 30)
    assert Sources(image=path).fingerprints() != before


def test_a_fingerprint_goes_with_the_content_and_not_with_the_path(tmp_path: Path) -> None:
    one, same, other = (
        Sources(image=save(tmp_path / name, seed=seed)).fingerprints()
        for name, seed in (("a.png", 0), ("b.png", 0), ("c.png", 1))
    )
    assert one == same
    assert one != other
    assert Sources().fingerprints() == {}


def test_the_record_says_what_a_video_is_made_from(tmp_path: Path) -> None:
    assert described(MODELS["tiny"], Sources()) == ""
    assert described(MODELS["tiny-i2v"], Sources()) == "image the built-in example"
    sources = Sources(image=save(tmp_path / "kite.png"))
    assert described(MODELS["i2v-14B"], sources) == f"image kite.png (sha256 {sources.fingerprints()['image']})"
    check_sources(MODELS["i2v-14B"], sources)


def test_the_example_is_the_same_each_time_and_moves_with_its_progress() -> None:
    picture = example_picture(64, 48)
    assert picture.shape == (48, 64, 3)
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, example_picture(64, 48))
    changed = (picture != example_picture(64, 48, progress=1.0)).any(axis=-1)
    assert 0.02 < changed.mean() < 0.9


def test_formats_and_quirks_that_change_nothing_are_named() -> None:
    tiny, i2v, flf2v = (MODELS[name] for name in ("tiny", "tiny-i2v", "tiny-flf2v"))

    def idle(spec: ModelSpec, solver: str = "unipc", **options: Any) -> set[str]:
        request = make_request(spec, seed=0, solver=solver, upstream_quirks=True)
        return set(idle_knobs(Options(clip_precision="fp32", **options), "cpu", spec, request))

    assert idle(tiny) == {"clip_precision"}
    assert idle(tiny, "dpm++") == {"clip_precision", "upstream_quirks"}
    assert idle(i2v) == set()
    assert idle(i2v, offload=True) == {"upstream_quirks"}
    assert idle(flf2v, "dpm++", offload=True) == set()


def test_planning_with_pictures_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from wan21.models import MODELS; from wan21.request import make_request\n"
        "from wan21.sources import Sources\n"
        "make_request(MODELS['i2v-14B'], seed=0, sources=Sources(image=sys.argv[1]))\n"
        "sys.exit('torch' in sys.modules)"
    )
    arguments = [sys.executable, "-c", code, save(tmp_path / "a.png")]
    assert subprocess.run(arguments, check=False).returncode == 0
