"""Which frames of a source are taken, against upstream's stored choices and a plain computation of them."""

import random
from typing import Any

import pytest

from wan21.errors import UsageError
from wan21.excerpts import excerpt_of
from wan21.shapes import VideoShape
from wan21.videos import VideoFacts

BUDGETS = {
    399360: VideoShape(num_frames=81, height=480, width=832),
    921600: VideoShape(num_frames=81, height=720, width=1280),
}


def facts(num_frames: int, fps: float, height: int, width: int) -> VideoFacts:
    return VideoFacts(height=height, width=width, spans=tuple((i / fps, (i + 1) / fps) for i in range(num_frames)))


def test_frames_and_sizes_equal_the_golden_ones(golden: dict[str, Any]) -> None:
    for case in golden["vace_video_sampling"]:
        budget = BUDGETS[case["area"]]
        assert budget.num_tokens == case["seq_len"]
        excerpt = excerpt_of(facts(case["frames"], case["fps"], case["h"], case["w"]), budget)
        assert list(excerpt.frame_ids) == case["frame_ids"]
        assert [excerpt.shape.height, excerpt.shape.width] == case["out_hw"]
        assert excerpt.shape.num_frames == case["n_out"] == len(case["frame_ids"])


def plainly(video: VideoFacts, budget: VideoShape) -> tuple[list[int], int, int]:
    """The choice as the specification words it, with numpy and none of the product's code."""
    import numpy as np

    seq_len, area, h, w = budget.num_tokens, budget.height * budget.width, video.height, video.width
    starts, ends = np.array(video.spans).T
    area_z = min(seq_len, area / 256, (h // 16) * (w // 16))
    of = min((video.num_frames - 1) // 4 + 1, int(seq_len / area_z))
    target = min(area_z, int(seq_len / of))
    oh = round(np.sqrt(target * h / w))
    ow = int(target / oh)
    times = np.linspace(0, (starts[-1] + ends[-1]) / 2, 4 * (of - 1) + 1)
    return [int(np.argmax((starts <= t) & (t <= ends))) for t in times], 16 * oh, 16 * ow


def test_random_videos_agree_with_a_plain_computation() -> None:
    generator = random.Random(0)
    for _ in range(300):
        video = facts(
            generator.randint(1, 400), generator.choice([8, 15, 16, 24, 25, 30]),
            generator.randint(64, 2000), generator.randint(64, 2000),
        )  # fmt: skip
        for budget in BUDGETS.values():
            excerpt = excerpt_of(video, budget)
            frame_ids, height, width = plainly(video, budget)
            assert (excerpt.shape.height, excerpt.shape.width) == (height, width)
            assert list(excerpt.frame_ids) == frame_ids
            assert excerpt.shape.num_tokens <= budget.num_tokens


def test_the_first_and_the_last_frame_are_kept() -> None:
    excerpt = excerpt_of(facts(500, 30, 480, 832), BUDGETS[399360])
    assert (excerpt.frame_ids[0], excerpt.frame_ids[-1]) == (0, 499)


def test_a_small_video_may_have_more_frames_and_a_smaller_budget_takes_fewer() -> None:
    small = facts(200, 16, 240, 416)
    assert excerpt_of(small, BUDGETS[399360]).shape == VideoShape(num_frames=197, height=240, width=416)
    assert excerpt_of(small, VideoShape(num_frames=9, height=240, width=416)).shape.num_frames == 9


def test_where_nothing_is_shown_the_frame_before_stands() -> None:
    gap = VideoFacts(height=480, width=832, spans=((0.0, 0.1), (0.1, 0.2), (5.0, 5.1), (5.1, 5.2), (5.2, 5.3)))
    assert excerpt_of(gap, BUDGETS[399360]).frame_ids == (0, 1, 1, 1, 4)


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [(8, 400, "too small: both sides have to be at least 16"), (16, 160_000, "too long and narrow")],
)
def test_a_video_without_a_token_on_a_side_is_refused(height: int, width: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        excerpt_of(facts(5, 16, height, width), BUDGETS[399360])
