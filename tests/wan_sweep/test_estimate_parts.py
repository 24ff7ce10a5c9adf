"""Lower bounds, the clock of estimates, the allocator's settings, and the cards, against numbers made by hand."""

from typing import Any

import pytest

from wan21.layout import SINGLE, Layout
from wan21.models import MODELS, DitConfig
from wan21.options import Options
from wan21.request import make_request
from wan_sweep.allocator import Settings, settings_of
from wan_sweep.cards import CARDS, card_like, card_named
from wan_sweep.estimate.clock import LowerBoundClock, all_steps
from wan_sweep.estimate.lower_bound import decode_operations, dit_operations, lower_bounds
from wan_sweep.units import GIB, MIB

H100 = card_named("H100-80GB")
LARGE = MODELS["t2v-14B"]


def test_a_forward_of_the_14b_model_takes_what_is_known_of_it() -> None:
    # 4 L^2 D a block of attention, and 2 x parameters x L: measured limits on an H100 are 10.8 s at 790 TFLOP/s.
    dit = LARGE.dit
    tokens = 75_600
    by_hand = dit.num_layers * (4 * tokens**2 * dit.dim) + 2 * 14e9 * tokens
    assert dit_operations(dit, Options(), tokens) == pytest.approx(by_hand, rel=0.06)


def test_decoding_takes_the_multiply_adds_that_the_decoder_counts() -> None:
    import torch

    from wan21.models import WAN_VAE
    from wan21.vae import WHOLE, Budget
    from wan21.vae.vae import Vae

    with torch.device("meta"):
        decoder = Vae(WAN_VAE).decoder
    counted = 2 * 20 * Budget(decoder, (21, 60, 104), itemsize=4).work(WHOLE)
    assert decode_operations(WAN_VAE, (21, 60, 104)) == pytest.approx(counted, rel=0.05)


def test_streamed_weights_bound_a_step_by_the_link_and_resident_ones_do_not() -> None:
    request = make_request(LARGE, seed=0, frame_num=1, size="832*480")
    full, block, resident = (
        lower_bounds(LARGE, options, request, H100)["step"]
        for options in (Options(), Options(load_strategy="block"), Options(load_strategy="block", resident_gib=40))
    )
    assert block == pytest.approx(2 * 2 * 40 * (8 * 5120**2 + 2 * 5120 * 13824) / H100.link_bandwidth)
    assert full == resident < block


def test_a_step_of_two_videos_takes_twice_as_long_as_that_of_one() -> None:
    request = make_request(LARGE, seed=0, batch_size=2, micro_batch_size=2)
    two = lower_bounds(LARGE, Options(), request, H100)
    one = lower_bounds(LARGE, Options(), make_request(LARGE, seed=0), H100)
    assert two["step"] == 2 * one["step"]
    assert two["denoise"] == 2 * one["denoise"] == 100 * one["step"]
    assert DitConfig(dim=8, ffn_dim=8, num_heads=2, num_layers=1).head_dim == 4


def test_the_blocks_that_vace_adds_count_as_any_block() -> None:
    vace = MODELS["vace-14B"]
    plain, steered = (lower_bounds(spec, Options(), make_request(spec, seed=0), H100)["step"] for spec in (LARGE, vace))
    assert steered == pytest.approx(plain * 48 / 40)


def test_what_both_passes_share_is_bounded_once() -> None:
    request = make_request(LARGE, seed=0)
    each, shared = (
        lower_bounds(LARGE, Options(share_first_attention=one), request, H100)["step"] for one in (False, True)
    )
    tokens, dim = 75_600, 5120
    once = 2 * (4 * tokens * dim**2 + 2 * tokens**2 * dim) / H100.half_flops
    assert each - shared == pytest.approx(once)
    assert 0.01 < once / each < 0.0125  # one of 80 self attentions
    options = (Options(share_first_attention=one, layout=Layout(cfg=2)) for one in (False, True))
    each, shared = (lower_bounds(LARGE, one, request, H100)["step"] for one in options)
    assert each - shared == pytest.approx(2 * tokens**2 * dim / H100.half_flops)  # half of its products, 2 n^2 d


def test_what_kernels_need_not_do_is_no_part_of_a_bound() -> None:
    request = make_request(LARGE, seed=0)
    ways = ({}, {"kernels": "fused"}, {"kernels": "fused", "attention_kernel": "fa3_fp8", "precision": "bf16"})
    plain, fused, eight_bits = (lower_bounds(LARGE, Options(**way), request, H100)["step"] for way in ways)
    tokens, dim = 75_600, 5120
    of_a_key = 2 * 40 * 2 * 2 * tokens * dim / H100.half_flops  # both passes, all blocks
    assert plain - fused == pytest.approx(512 * of_a_key)  # a prompt's padding is read as one token
    assert fused - eight_bits == pytest.approx(tokens / 2 * of_a_key)


class Kept:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def write(self, event: dict[str, Any], *, is_urgent: bool) -> None:
        assert is_urgent
        self.events.append(event)


def event(kind: str, name: str, which: str, index: int | None = None, **more: Any) -> dict[str, Any]:
    total = 4 if kind == "step" else None
    return {"kind": kind, "name": name, "event": which, "index": index, "total": total, "seconds": 9.0, **more}


def test_ranks_share_tokens_passes_tiles_and_the_link_and_each_reads_its_weights() -> None:
    request = make_request(LARGE, seed=0)

    def bounds(layout: Layout, **options: Any) -> dict[str, float]:
        return lower_bounds(LARGE, Options(layout=layout, **options), request, H100)

    alone, two, grid, passes = map(bounds, (SINGLE, Layout(ulysses=2), Layout(ulysses=2, ring=2), Layout(cfg=2)))
    for name in ("step", "denoise", "decode"):
        assert two[name] == pytest.approx(alone[name] / 2)
        assert passes[name] == pytest.approx(alone[name] / 2)
        assert grid[name] == pytest.approx(alone[name] / 4)
    assert two["encode_text"] == alone["encode_text"]
    streamed = [bounds(layout, load_strategy="part")["encode_text"] for layout in (SINGLE, Layout(ulysses=2))]
    assert streamed[1] == pytest.approx(streamed[0] / 2)


def test_events_happen_where_the_lower_bounds_put_them_and_the_last_step_is_the_real_last() -> None:
    kept, bounds = Kept(), {"denoise": 100.0, "step": 2.0, "decode": 7.0}
    clock = LowerBoundClock(kept, bounds, load_bandwidth=10.0, num_steps=50, num_run=4)
    events = [event("phase", "load", "begin"), event("component", "dit", "begin")]
    events += [event("component", "dit", "end", moved_bytes=30), event("phase", "load", "end")]
    events += [event("phase", "denoise", "begin")]
    for index in range(4):
        events += [event("step", "step", "begin", index), event("block", "block", "begin", 0)]
        events += [event("block", "block", "end", 0), event("step", "step", "end", index, peak=index)]
    events += [event("phase", "denoise", "end"), event("phase", "decode", "begin")]
    events += [event("video", "video", which, 0) | {"total": 1} for which in ("begin", "end")]
    events += [event("phase", "decode", "end")]
    for one in events:
        clock.write(one, is_urgent=True)
    assert clock.seconds == {"load": 3.0, "denoise": 100.0, "decode": 7.0}
    steps = [one for one in kept.events if one["kind"] == "step" and one["event"] == "end"]
    assert [(one["index"], one["total"]) for one in steps] == [(index, 50) for index in range(50)]
    assert [one["peak"] for one in steps] == [0, 1, *[2] * 47, 3]
    assert [one["seconds"] for one in steps] == [2.0] * 50
    assert [one["elapsed_s"] for one in steps] == [3.0 + 2.0 * (index + 1) for index in range(50)]
    assert sum(one["kind"] == "block" for one in kept.events) == 100
    assert [one["seconds"] for one in kept.events if one["kind"] == "video" and one["event"] == "end"] == [7.0]
    assert kept.events[-1]["elapsed_s"] == 110.0
    assert kept.events[-1]["time"] - kept.events[0]["time"] == pytest.approx(110.0)


def test_the_steps_between_are_repeated_for_each_group_of_videos() -> None:
    kept = Kept()
    clock = LowerBoundClock(kept, {"step": 1.0}, load_bandwidth=1.0, num_steps=5, num_run=4)
    for index in range(8):
        for which in ("begin", "end"):
            clock.write(event("step", "step", which, index, peak=index) | {"total": 8}, is_urgent=True)
    steps = [one for one in kept.events if one["event"] == "end"]
    assert [(one["index"], one["total"], one["peak"]) for one in steps] == [
        (index, 10, peak) for index, peak in enumerate([0, 1, 2, 2, 3, 4, 5, 6, 6, 7])
    ]


def test_a_series_has_all_steps_of_the_run_for_each_group_of_videos() -> None:
    assert all_steps([1, 2, 3, 4], num_steps=4, num_run=4) == [1, 2, 3, 4]
    assert all_steps([1, 2, 3, 4, 5, 6, 7, 8], num_steps=6, num_run=4) == [1, 2, 3, 3, 3, 4, 5, 6, 7, 7, 7, 8]


@pytest.mark.parametrize(
    ("conf", "settings", "unknown"),
    [
        ("", Settings(), ()),
        ("expandable_segments:True", Settings(expandable_segments=True), ()),
        (
            "max_split_size_mb:64, roundup_power2_divisions:4",
            Settings(max_split_bytes=64 * MIB, roundup_divisions=(4,)),
            (),
        ),
        ("backend:native,garbage_collection_threshold:0.8", Settings(), ("garbage_collection_threshold:0.8",)),
        (
            "roundup_power2_divisions:[256:1,>:8],pinned_use_background_threads:True",
            Settings(),
            ("roundup_power2_divisions:[256:1,>:8]",),
        ),
    ],
)
def test_the_allocators_settings_are_read_as_torch_reads_them(
    conf: str, settings: Settings, unknown: tuple[str, ...]
) -> None:
    assert settings_of({"PYTORCH_CUDA_ALLOC_CONF": conf}) == (settings, unknown)
    assert settings_of({"PYTORCH_ALLOC_CONF": conf}) == (settings, unknown)


def test_a_gpu_is_known_by_its_name_and_size() -> None:
    assert card_like("NVIDIA A100-SXM4-40GB", 40 * GIB) is CARDS["A100-40GB"]
    assert card_like("NVIDIA A100-SXM4-80GB", 80 * GIB) is CARDS["A100-80GB"]
    assert card_like("NVIDIA GeForce RTX 4060 Ti", 16 * GIB) is None
    assert all(card.half_flops >= card.tf32_flops >= card.fp32_flops for card in CARDS.values())
