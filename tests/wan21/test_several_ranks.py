"""Real processes that make a video together get what one process gets.

The lists of layouts may be extended: a world is as large as the largest of them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.wan21.fake_dashscope import ANSWER, GOOD_KEY, serving
from tests.wan21.ranks import (
    Forward,
    Ranks,
    agree_on_text,
    command_line,
    decode_tiles,
    extend_for_all,
    forward,
    forwards,
    generate,
    relative_distance,
)
from wan21.layout import SINGLE, Layout

pytestmark = pytest.mark.slow

EXACT = 2e-5  # relative; float32 sums in another order, over all layers and steps

SEQUENCES = [
    Layout(ulysses=2),
    Layout(ulysses=4),
    Layout(ring=2),
    Layout(ring=4),
    Layout(ulysses=2, ring=2),
    Layout(ulysses=3),
]
FORWARDS = [
    Forward(),
    Forward(grid=(3, 3, 5), batch_size=2, most_rows=8),
    Forward(grid=(1, 1, 5), most_queries=2),
    Forward(grid=(3, 3, 5), most_queries=8, most_rows=64, is_fused=True),
    Forward(grid=(3, 5, 7), batch_size=2, fewest_rows=4, is_fused=True),
    Forward(grid=(3, 5, 7), most_rows=64, on_host=0.5),
]
ON_EIGHT = [  # 12 heads, which eight ranks of Ulysses cannot share, but with a model of eight heads
    (Layout(ulysses=4, ring=2), Forward(grid=(3, 3, 5), batch_size=2, most_rows=64, is_fused=True)),
    (Layout(ulysses=2, ring=4), Forward(grid=(3, 3, 5), most_queries=4)),
    (Layout(ring=8), Forward(grid=(1, 1, 5))),
    (Layout(ring=8), Forward(grid=(3, 5, 7), most_rows=64, on_host=0.5)),
    (Layout(ulysses=8), Forward(grid=(3, 5, 7), most_rows=64, num_heads=8, fewest_rows=4, is_fused=True)),
]
MOST_RANKS = 8


def named(layout: Layout) -> str:
    marks = [f"cfg{layout.cfg}" if layout.cfg > 1 else "", "dit_fsdp" * layout.dit_fsdp, "t5_fsdp" * layout.t5_fsdp]
    return "-".join(filter(None, [f"U{layout.ulysses}R{layout.ring}", *marks]))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    found = Ranks(MOST_RANKS)
    yield found
    found.close()


@pytest.fixture(scope="module")
def known(ranks: Ranks) -> Any:
    """Results by rank, made once each."""
    found: dict[str, Any] = {}

    def results(layout: Layout, function: Any, *arguments: Any) -> Any:
        key = repr((layout, function, arguments))
        if key not in found:
            found[key] = ranks.run(layout.world_size, function, layout, *arguments)
        return found[key]

    return results


@pytest.fixture(scope="module")
def alone(known: Any) -> Any:
    """Results of one process."""
    return lambda function, *arguments: known(SINGLE, function, *arguments)[0]


@pytest.mark.parametrize("case", FORWARDS, ids=str)
@pytest.mark.parametrize("layout", SEQUENCES, ids=named)
def test_a_forward_of_several_ranks_equals_that_of_one(known: Any, alone: Any, layout: Layout, case: Forward) -> None:
    cases, number = tuple(FORWARDS), FORWARDS.index(case)
    expected = alone(forwards, cases)[number]
    for results in known(layout, forwards, cases):
        assert relative_distance(results[number]["velocity"], expected["velocity"]) < EXACT


@pytest.mark.parametrize(("layout", "case"), ON_EIGHT, ids=[f"{named(layout)}-{case}" for layout, case in ON_EIGHT])
def test_a_forward_of_eight_ranks_equals_that_of_one(known: Any, alone: Any, layout: Layout, case: Forward) -> None:
    cases = tuple(other for place, other in ON_EIGHT if place == layout)
    number = cases.index(case)
    expected = alone(forwards, cases)[number]
    for results in known(layout, forwards, cases):
        assert relative_distance(results[number]["velocity"], expected["velocity"]) < EXACT


PIPELINES: list[tuple[Layout, dict[str, Any], dict[str, Any]]] = [
    (Layout(ulysses=2), {}, {}),
    (Layout(ring=4), {"batch_size": 2, "micro_batch_size": 2}, {"offload": True}),
    (Layout(cfg=2), {}, {"t5_cpu": True}),
    (Layout(cfg=2), {}, {"share_first_attention": True, "attention_slices": 2}),
    (Layout(cfg=2, ulysses=2), {}, {"share_first_attention": True}),
    (Layout(ulysses=2, ring=2, dit_fsdp=True, t5_fsdp=True), {}, {}),
    (Layout(cfg=2, ring=2, dit_fsdp=True), {}, {"offload": True}),
    (Layout(ring=3, dit_fsdp=True, t5_fsdp=True), {}, {}),  # shares that do not divide
    (Layout(ulysses=2, t5_fsdp=True), {"guide_scale": 1.0}, {"offload": True}),
    (Layout(ulysses=4), {}, {"load_strategy": "block"}),
    (Layout(cfg=2, ulysses=2), {}, {"load_strategy": "part", "resident_gib": 0.002, "offload": True}),
    (Layout(cfg=2), {}, {"load_strategy": "part", "t5_cpu": True}),
    (Layout(ring=2), {}, {"load_strategy": "part", "attention_slices": 2, "residual_on_host": 0.5}),
    (Layout(ulysses=2, dit_fsdp=True), {"model": "tiny-vace"}, {"offload": True}),
    (Layout(cfg=2, ring=2), {"model": "tiny-vace"}, {"load_strategy": "part", "residual_on_host": 0.5}),
    (Layout(ulysses=8, dit_fsdp=True, t5_fsdp=True), {}, {}),
    (Layout(ulysses=8), {}, {"load_strategy": "part"}),
    (Layout(ulysses=4, ring=2), {}, {}),
    (Layout(ulysses=2, ring=4), {}, {}),
    (Layout(ring=8), {}, {}),
    (Layout(cfg=2, ulysses=4), {}, {}),
]


@pytest.mark.parametrize(("layout", "asked", "chosen"), PIPELINES, ids=[named(case[0]) for case in PIPELINES])
def test_from_prompt_to_video_several_ranks_get_what_one_gets(
    known: Any, alone: Any, layout: Layout, asked: dict[str, Any], chosen: dict[str, Any]
) -> None:
    expected = alone(generate, asked, {})
    results = known(layout, generate, asked, chosen)
    for result in results:
        assert relative_distance(result["latents"], expected["latents"]) < EXACT
        assert layout.sequence > 1 or np.array_equal(result["latents"], expected["latents"])
        assert result["loaded"] == result["expected"]
    assert [len(result["videos"]) for result in results] == [len(expected["videos"])] + [0] * (len(results) - 1)
    for video, wanted in zip(results[0]["videos"], expected["videos"], strict=True):
        assert video.shape == wanted.shape
        assert np.abs(video.astype(int) - wanted.astype(int)).max() <= 1  # a last bit decides where pixels are cut off


def test_two_runs_with_one_seed_give_the_same_bits(ranks: Ranks, known: Any) -> None:
    layout = Layout(ulysses=2, ring=2)
    first, second = known(layout, generate, {}, {}), ranks.run(4, generate, layout, {}, {})
    assert all(np.array_equal(one["latents"], first[0]["latents"]) for one in (*first, *second))
    assert np.array_equal(first[0]["videos"][0], second[0]["videos"][0])


@pytest.mark.parametrize("layout", [Layout(ulysses=4), Layout(ring=4), Layout(ulysses=2, ring=2)], ids=named)
def test_a_forward_of_several_ranks_takes_a_share_of_the_memory_of_one(
    ranks: Ranks, alone: Any, layout: Layout
) -> None:
    case = Forward(grid=(5, 12, 16), most_rows=64)
    peak = alone(forward, case)["peak"]
    for result in ranks.run(layout.world_size, forward, layout, case):
        assert result["peak"] < 0.45 * peak  # a quarter, two chunks, and what is gathered at the end


def test_streamed_weights_lie_on_the_hosts_once_in_all_and_change_no_bit(known: Any, alone: Any) -> None:
    layout, chosen = Layout(ulysses=2, ring=2), {"load_strategy": "part"}
    whole = alone(generate, {}, chosen)["host_bytes"]
    for result, resident in zip(known(layout, generate, {}, chosen), known(layout, generate, {}, {}), strict=True):
        assert whole / 4 <= result["host_bytes"] < 1.1 * whole / 4  # pages, and pieces that do not divide
        assert np.array_equal(result["latents"], resident["latents"])


def test_sharded_weights_take_their_share_of_each_device_and_change_no_bit(known: Any, alone: Any) -> None:
    chosen = {"precision": "bf16"}  # beside which the float32 parts have to stay what they are
    whole = alone(generate, {}, chosen)["loaded"]
    sharded = known(Layout(ulysses=2, ring=2, dit_fsdp=True, t5_fsdp=True), generate, {}, chosen)
    for result, resident in zip(sharded, known(Layout(ulysses=2, ring=2), generate, {}, chosen), strict=True):
        assert np.array_equal(result["latents"], resident["latents"])
        for name in ("dit", "t5"):
            assert whole[name] / 4 < result["loaded"][name] < 1.06 * whole[name] / 4  # norms and the head stay whole


def test_only_the_first_rank_loads_a_text_encoder_that_is_not_shared(known: Any) -> None:
    loaded = [list(result["loaded"]) for result in known(Layout(cfg=2), generate, {}, {"t5_cpu": True})]
    assert loaded == [["t5", "dit", "vae"], ["dit", "vae"]]


@pytest.mark.parametrize("size", [2, 4])
def test_tiles_decoded_by_all_ranks_are_those_of_one(ranks: Ranks, alone: Any, size: int) -> None:
    expected = alone(decode_tiles, 1, 3)
    video, *others = ranks.run(size, decode_tiles, Layout(ring=size), 1, 3)
    assert np.array_equal(video, expected)
    assert others == [None] * (size - 1)


def test_the_command_line_runs_on_several_ranks_and_one_of_them_writes(ranks: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    flags = ["--task", "tiny", "--ckpt_dir", "random", "--size", "96*64", "--frame_num", "1", "--sample_steps", "1"]
    flags += ["--device", "cpu", "--save_file", str(path), "--cfg_parallel", "--dit_fsdp"]
    assert ranks.run(2, command_line, None, flags) == [0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["out.mp4"]


@pytest.mark.parametrize("texts", [["风筝 über dem Hafen", "a kite"], ["", "a kite"], ["a", ""]])
def test_a_text_is_agreed_on_whatever_its_length(ranks: Ranks, texts: list[str]) -> None:
    assert ranks.run(2, agree_on_text, Layout(ring=2), texts) == [texts[0]] * 2


def test_one_of_several_ranks_extends_the_prompt_for_all(ranks: Ranks, tmp_path: Path) -> None:
    flags = ["--task", "tiny", "--ckpt_dir", "random", "--size", "96*64", "--frame_num", "1", "--sample_steps", "1"]
    flags += ["--device", "cpu", "--prompt", "a kite", "--cfg_parallel", "--base_seed", "1"]
    extend = ["--use_prompt_extend", "--prompt_extend_method", "dashscope"]
    alone, both = tmp_path / "alone.mp4", tmp_path / "both.mp4"
    with serving() as fake:
        variables = {"DASH_API_URL": fake.url, "DASH_API_KEY": GOOD_KEY, "no_proxy": "127.0.0.1"}
        arguments = [*flags, *extend, "--save_file", str(both)]
        assert ranks.run(2, command_line, None, arguments, variables) == [0, 0]
        assert len(fake.requests) == 1
    assert ranks.run(2, command_line, None, [*flags, "--prompt", ANSWER, "--save_file", str(alone)]) == [0, 0]
    assert both.read_bytes() == alone.read_bytes()


def test_one_of_several_ranks_of_a_job_extends_the_prompt_for_all_and_tells_of_it(ranks: Ranks) -> None:
    with serving() as fake:
        variables = {"DASH_API_URL": fake.url, "DASH_API_KEY": GOOD_KEY, "no_proxy": "127.0.0.1"}
        (extended, told), other = ranks.run(2, extend_for_all, Layout(ulysses=2), variables)
        assert (extended, other) == (ANSWER, (ANSWER, None))
        assert told["prompt"] == ANSWER
        (kept, told), other = ranks.run(2, extend_for_all, Layout(ulysses=2), variables | {"DASH_API_KEY": "sk-bad"})
        assert (kept, other) == ("a kite", ("a kite", None))
        assert "HTTP status 401" in told["problem"]
        assert len(fake.requests) == 2
