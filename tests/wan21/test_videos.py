"""Videos from files: what they hold, and every way in which they cannot be read."""

import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import pytest
import torch

from wan21.errors import MissingPackageError, UsageError
from wan21.frames import save_image, save_video
from wan21.videos import inspect_video, read_frames

FPS = 16
CLOSE = 12  # of 255: what H.264 loses on plain colours


def plain_frames(num_frames: int, height: int = 32, width: int = 48) -> torch.Tensor:
    """Each frame of one shade of its own, brighter from frame to frame, with a red top left corner."""
    shades = torch.arange(num_frames).mul(200 // num_frames).add(20).to(torch.uint8)
    frames = shades.view(-1, 1, 1, 1).expand(-1, height, width, 3).clone()
    frames[:, : height // 2, : width // 2] = torch.tensor([200, 20, 20], dtype=torch.uint8)
    return frames


@pytest.fixture
def video(tmp_path: Path) -> str:
    path = tmp_path / "video.mp4"
    save_video(plain_frames(10), path)
    return str(path)


def test_facts_are_those_of_the_file(video: str) -> None:
    facts = inspect_video("src_video", video)
    assert (facts.num_frames, facts.height, facts.width) == (10, 32, 48)
    assert facts.spans == tuple((i / FPS, (i + 1) / FPS) for i in range(10))


def test_the_frames_asked_for_come_in_order_and_as_often_as_asked(video: str) -> None:
    frames = list(read_frames("src_video", video, [0, 3, 3, 9]))
    assert [frame.shape for frame in frames] == [(32, 48, 3)] * 4
    shades = plain_frames(10)[[0, 3, 3, 9], -1, -1, 0].tolist()
    assert all(abs(int(frame[-1, -1, 0]) - shade) <= CLOSE for frame, shade in zip(frames, shades, strict=True))
    assert list(read_frames("src_video", video, [])) == []


def test_a_video_that_is_shown_turned_comes_turned(video: str, tmp_path: Path) -> None:
    turned = str(tmp_path / "turned.mp4")
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error"]
    subprocess.run([*ffmpeg, "-display_rotation", "90", "-i", video, "-c", "copy", turned], check=True)
    facts = inspect_video("src_video", turned)
    assert (facts.height, facts.width) == (48, 32)
    (frame,) = read_frames("src_video", turned, [2])
    assert torch.tensor(frame).shape == (48, 32, 3)  # which negative strides would not become
    corner, opposite = frame[-1, 0].tolist(), frame[0, 0].tolist()  # counterclockwise, top left comes to bottom left
    assert corner[0] - corner[1] > 100
    assert abs(opposite[0] - opposite[1]) <= CLOSE


def test_facts_are_taken_anew_when_the_file_changes(video: str) -> None:
    before = inspect_video("src_video", video)
    save_video(plain_frames(4), Path(video))
    assert (before.num_frames, inspect_video("src_video", video).num_frames) == (10, 4)


def test_frames_out_of_order_or_beyond_the_end_are_refused(video: str) -> None:
    with pytest.raises(ValueError, match="do not ascend"):
        list(read_frames("src_video", video, [3, 1]))
    with pytest.raises(UsageError, match="has no frame 10"):
        list(read_frames("src_video", video, [1, 10]))


def test_what_is_no_video_is_refused_by_name(tmp_path: Path) -> None:
    text, damaged, sound, folder = (tmp_path / name for name in ("text.mp4", "damaged.mp4", "sound.wav", "folder"))
    text.write_text("not a video")
    save_video(plain_frames(10), damaged)
    damaged.write_bytes(damaged.read_bytes()[:300])
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "lavfi", "-i", "sine=duration=0.1", str(sound)]
    subprocess.run(ffmpeg, check=True)
    folder.mkdir()
    for path, reason in (
        (text, "is no video that can be read"),
        (damaged, "is no video that can be read"),
        (sound, "holds no video"),
        (folder, "is not a file"),
        (tmp_path / "absent.mp4", "does not exist"),
    ):
        with pytest.raises(UsageError, match=rf"src_video={path} {reason}"):
            inspect_video("src_video", str(path))


def test_a_video_without_frames_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty.avi"
    source = ["-f", "lavfi", "-i", "color=size=32x32:duration=1", "-frames:v", "0"]
    ffmpeg = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "quiet", *source, "-c:v", "rawvideo", str(empty)]
    subprocess.run(ffmpeg, check=False)
    assert empty.exists()
    with pytest.raises(UsageError, match="has no frames"):
        inspect_video("src_video", str(empty))


def test_a_picture_is_a_video_of_one_frame(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    save_image(plain_frames(1)[0], path)
    assert inspect_video("src_video", str(path)).num_frames == 1


def test_without_pyav_the_message_names_the_extra(video: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingPackageError, match=r"needs the package av.*wan-sweep\[video\], or leave src_video out"):
        list(read_frames("src_video", video, [0]))
