"""The pipeline on the tiny model: each option keeps its promise on the output and shows its effect."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from wan21.assets import open_assets
from wan21.errors import UsageError
from wan21.events import SILENT, Observer, Span, together
from wan21.models import ModelSpec, model_spec
from wan21.options import Options
from wan21.pipeline import Generation, VideoPipeline
from wan21.request import Request, make_request
from wan21.runtime import CpuRuntime
from wan21.weights.random import RandomWeights
from wan21.weights.write import write_folder

SPEC = model_spec("tiny")
SAME_ROUNDING = 1e-4  # relative, after all steps: the same sums in float32 over other tile shapes


@dataclass
class Listener:
    """Remembers what it hears, and how much stood at the end of each span."""

    runtime: CpuRuntime | None = None
    wants_blocks: bool = False
    heard: list[Span] = field(default_factory=list)
    ended: list[tuple[Span, int, int]] = field(default_factory=list)

    @contextmanager
    def span(self, span: Span) -> Iterator[None]:
        self.heard.append(span)
        if self.runtime is not None:
            self.runtime.memory()
            self.runtime.reset_memory_peaks()
        yield
        if self.runtime is not None:
            memory = self.runtime.memory()
            self.ended.append((span, memory.allocated_bytes, memory.allocated_peak_bytes))

    def names(self, kind: str) -> list[str]:
        return [span.name for span in self.heard if span.kind == kind]

    def at_end(self, name: str) -> int:
        return next(now for span, now, _ in self.ended if span.name == name)

    def peak(self, name: str) -> int:
        return max(peak for span, _, peak in self.ended if span.name == name)


def request(**changes: Any) -> Request:
    settings: dict[str, Any] = {"seed": 7, "size": "96*64", "frame_num": 5, "num_steps": 2}
    return make_request(SPEC, **(settings | changes))


def generate(
    asked: Request | None = None,
    *,
    observer: Observer = SILENT,
    runtime: CpuRuntime | None = None,
    spec: ModelSpec = SPEC,
    **options: Any,
) -> Generation:
    options.setdefault("precision", "fp32")
    chosen = Options(**options)
    runtime = runtime or CpuRuntime()
    assets = open_assets(spec, chosen, runtime)
    return VideoPipeline(spec, chosen, assets, runtime, observer).generate(asked or request())


def measured(asked: Request | None = None, **options: Any) -> Listener:
    runtime = CpuRuntime()
    listener = Listener(runtime)
    with runtime.counting():
        generate(asked, observer=listener, runtime=runtime, **options)
    return listener


@pytest.fixture(scope="module")
def plain() -> Generation:
    return generate()


def relative_l2(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def test_a_video_has_the_shape_asked_for_and_is_neither_black_nor_flat(plain: Generation) -> None:
    assert [tuple(video.shape) for video in plain.videos] == [(5, 64, 96, 3)]
    assert plain.videos[0].dtype == torch.uint8
    assert tuple(plain.latents.shape) == (1, 16, 2, 8, 12)
    assert plain.videos[0].float().std() > 5


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_video(plain: Generation) -> None:
    assert torch.equal(generate().latents, plain.latents)
    assert not torch.equal(generate(request(seed=8)).latents, plain.latents)


@pytest.mark.parametrize(
    "options",
    [
        {"offload": True},
        {"load_strategy": "block"},
        {"load_strategy": "part"},
        {"load_strategy": "part", "offload": True, "resident_gib": 0.002},
        {"load_strategy": "part", "t5_cpu": True},
        {"t5_cpu": True},
        {"gradient_checkpointing": True},
    ],
)
def test_where_weights_live_changes_no_bit(plain: Generation, options: dict[str, Any]) -> None:
    generation = generate(**options)
    assert torch.equal(generation.latents, plain.latents)
    assert torch.equal(generation.videos[0], plain.videos[0])


@pytest.mark.parametrize("slices", [2, "auto"])
def test_attention_slices_change_no_more_than_rounding(plain: Generation, slices: Any) -> None:
    assert relative_l2(generate(attention_slices=slices).latents, plain.latents) < SAME_ROUNDING


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_gives_nearly_the_same_latents(plain: Generation, precision: str) -> None:
    distance = relative_l2(generate(precision=precision).latents, plain.latents)
    assert 0 < distance < 0.05  # rounding of every block, amplified by guidance


def test_videos_of_a_batch_equal_those_made_alone(plain: Generation) -> None:
    for micro_batch_size in (1, 2):
        batch = generate(request(batch_size=3, micro_batch_size=micro_batch_size))
        assert batch.seeds == [7, 8, 9]
        assert len(batch.videos) == 3
        assert relative_l2(batch.latents[:1], plain.latents) < SAME_ROUNDING
        assert relative_l2(batch.latents[1:2], generate(request(seed=8)).latents) < SAME_ROUNDING


def test_phases_come_in_order_and_offload_loads_just_in_time() -> None:
    listener = Listener()
    generate(observer=listener)
    assert listener.names("phase") == ["load", "encode_text", "denoise", "decode"]
    assert listener.names("component") == ["t5", "dit", "vae"]
    listener = Listener()
    generate(observer=listener, offload=True)
    assert listener.names("phase") == ["load", "encode_text", "load", "denoise", "load", "decode"]
    assert listener.names("release") == ["t5", "dit", "vae"]


def test_steps_and_blocks_are_counted() -> None:
    listener = Listener(wants_blocks=True)
    generate(request(batch_size=2), observer=together(SILENT, listener))
    assert [(span.index, span.total) for span in listener.heard if span.kind == "step"] == [(i, 4) for i in range(4)]
    blocks = [span.index for span in listener.heard if span.kind == "block"]
    encode, forward = list(range(SPEC.text.num_layers)), list(range(SPEC.dit.num_layers))
    assert blocks == encode + 4 * 2 * forward  # both prompts share the visits of the text encoder's blocks


def test_guidance_of_one_needs_one_pass_a_step() -> None:
    listener = Listener(wants_blocks=True)
    generate(request(guide_scale=1.0), observer=listener)
    in_denoise = [span for span in listener.heard if span.kind == "block"][SPEC.text.num_layers :]
    assert len(in_denoise) == 2 * SPEC.dit.num_layers  # two steps; and the negative prompt was not encoded


def test_an_image_is_a_video_of_one_frame() -> None:
    generation = generate(request(frame_num=1))
    assert tuple(generation.videos[0].shape) == (1, 64, 96, 3)


def test_both_solvers_run_and_differ(plain: Generation) -> None:
    assert not torch.equal(generate(request(solver="dpm++")).latents, plain.latents)


@pytest.mark.parametrize("source", ["random", "one file", "shards"])
@pytest.mark.parametrize("load_strategy", ["full", "block", "part"])
def test_each_component_adds_exactly_the_bytes_of_its_parameters(
    source: str, load_strategy: str, tmp_path: Path
) -> None:
    folder = None
    if source != "random":
        folder = str(tmp_path / "checkpoint")
        weights = RandomWeights(SPEC, 0, CpuRuntime().generator)
        write_folder(Path(folder), SPEC, weights, num_shards=3 if source == "shards" else 1)
    listener = measured(ckpt_dir=folder, load_strategy=load_strategy)
    expected = {span.name: span.expected_bytes for span in listener.heard if span.kind == "component"}
    before = 0
    for name in ("t5", "dit", "vae"):
        assert listener.at_end(name) - before == expected[name]
        before = listener.at_end(name)


def test_offload_leaves_one_component_at_a_time() -> None:
    everything = measured()
    offloaded = measured(offload=True)
    sizes = {span.name: span.expected_bytes or 0 for span in everything.heard if span.kind == "component"}
    standing = everything.at_end("decode") - offloaded.at_end("decode")
    assert standing == sizes["t5"] + sizes["dit"]
    assert everything.peak("denoise") - offloaded.peak("denoise") == sizes["t5"] + sizes["vae"]


def test_blocks_streamed_take_two_blocks_of_room() -> None:
    full, streamed = measured(), measured(load_strategy="block")
    sizes = [{s.name: s.expected_bytes or 0 for s in run.heard if s.kind == "component"} for run in (full, streamed)]
    assert sizes[1]["dit"] < 0.7 * sizes[0]["dit"]
    saved = sum(sizes[0].values()) - sum(sizes[1].values())
    assert full.at_end("denoise") - streamed.at_end("denoise") == saved


def test_parts_streamed_take_less_than_blocks_and_budgets_are_used() -> None:
    runs = [
        measured(load_strategy="block"),
        measured(load_strategy="part"),
        measured(load_strategy="part", resident_gib=0.004),
    ]
    block, part, budget = ({s.name: s.expected_bytes or 0 for s in run.heard if s.kind == "component"} for run in runs)
    for name in ("t5", "dit"):
        assert part[name] < 0.6 * block[name]
        assert 0.5 * 0.004 * 2**30 < budget[name] - part[name] <= 0.004 * 2**30
    text = SPEC.text
    assert block["t5"] - part["t5"] > text.vocab_size * text.dim * 2  # the table of tokens is not on the device


def test_steps_allocate_nothing_new_after_the_second() -> None:
    # The first makes room for the solver's history; the last one forgets it.
    listener = measured(request(num_steps=7), load_strategy="part", attention_slices=4, offload=True)
    steps = [(now, peak) for span, now, peak in listener.ended if span.kind == "step"]
    assert len(set(steps[1:6])) == 1


@pytest.mark.parametrize("ways", [{"rows_at_once": 64}, {"residual_on_host": 0.7, "load_strategy": "part"}])
def test_how_the_residual_is_cut_changes_no_more_than_rounding(plain: Generation, ways: dict[str, Any]) -> None:
    batch = generate(request(batch_size=2), **ways)
    assert relative_l2(batch.latents[:1], plain.latents) < SAME_ROUNDING


@pytest.mark.parametrize(
    "wrong", [{"rows_at_once": 0}, {"residual_on_host": 1.5}, {"resident_gib": -1.0}, {"resident_gib": float("inf")}]
)
def test_options_that_cannot_be_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))}={next(iter(wrong.values()))} is not"):
        Options(**wrong)


def test_half_precision_halves_the_transformer() -> None:
    full, half = measured(), measured(precision="bf16")
    sizes = [next(s.expected_bytes or 0 for s in run.heard if s.name == "dit") for run in (full, half)]
    assert 0.5 < sizes[1] / sizes[0] < 0.75  # norms, modulation, time embedding and head stay float32


def test_micro_batches_trade_memory_for_forwards() -> None:
    alone = measured(request(batch_size=2, num_steps=1))
    shared = measured(request(batch_size=2, micro_batch_size=2, num_steps=1))
    assert alone.peak("step") < shared.peak("step")
    assert len(alone.names("step")) == 2 * len(shared.names("step"))
