"""The whole pipeline on a fake device, where shortcuts and stand-ins must not change a byte."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from wan21.dit.operations import FusedOperations, Operations
from wan21.models import MODELS
from wan21.text.umt5 import TextEncoder
from wan21.weights.load import materialize
from wan21.weights.random import RandomWeights
from wan_sweep.allocator import Settings
from wan_sweep.allocator.rules import SMALL_SEGMENT_BYTES
from wan_sweep.cards import card_named
from wan_sweep.estimate.dry_run import DryRun, Simulation, dry_run
from wan_sweep.estimate.fake_device import STAND_IN
from wan_sweep.estimate.memory import Event, Take
from wan_sweep.estimate.replay import Replays
from wan_sweep.estimate.weights import UndrawnWeights
from wan_sweep.schema import Job

H100 = card_named("H100-80GB")
TINY = Job(model="tiny", device="cuda")
JOBS = {
    "tiled": TINY.replace(size="256*160", frame_num=13, vae_budget_gib=0.01, offload=True, sample_steps=1),
    "streamed": TINY.replace(load_strategy="block", offload=True, attention_slicing=True, precision="fp32"),
    "controlled": Job(model="tiny-vace", device="cuda").replace(
        size="160*96", frame_num=17, vae_budget_gib=0.012, load_strategy="part", offload=True, sample_steps=1
    ),
    "batch": TINY.replace(batch_size=3, micro_batch_size=2, t5_cpu=True, sample_guide_scale=1, sample_solver="dpm++"),
}


WINDOWED = [
    {"attention_slicing": True},
    {"residual_on_host": 0.5},
    {"kernels": "fused"},
    {"ring_size": 2},
    {"ulysses_size": 2, "attention_slicing": True},
    {"model": "tiny", "load_strategy": "block", "cfg_parallel": True, "share_first_attention": True},
]


def highest(simulation: Simulation) -> dict[str, tuple[object, ...]]:
    """Where each phase's peak was, what asked for it, and what was there besides."""
    return {
        phase: (
            moment.place,
            moment.operation,
            sorted((one.operation, one.num_bytes, one.shape or (), one.place.phase) for one in moment.holdings),
        )
        for phase, moment in simulation.memory.peaks().items()
    }


def bytes_of(run: DryRun) -> dict[str, int | float]:
    assert run.error is None
    names = [name for name in run.metrics if name.startswith("memory/") and "host_rss" not in name]
    return {name: run.metrics[name] for name in names}


@pytest.fixture(scope="module", params=JOBS)
def job(request: pytest.FixtureRequest) -> Job:
    return JOBS[request.param]


@pytest.fixture(scope="module")
def simulation(job: Job) -> Simulation:
    assert job.model
    return Simulation(H100, Settings())


@pytest.fixture(scope="module")
def predicted(job: Job, simulation: Simulation) -> DryRun:
    return dry_run(job, simulation)


def test_a_second_meta_device_gives_the_same_bytes_as_fake_cuda(job: Job, predicted: DryRun) -> None:
    stand_in = Simulation(H100, Settings(), device=STAND_IN)
    assert bytes_of(dry_run(job, stand_in)) == bytes_of(predicted)


def test_running_every_block_gives_the_same_bytes_as_repeating_the_first(
    job: Job, predicted: DryRun, simulation: Simulation
) -> None:
    long_way = Simulation(H100, Settings(), repeats_blocks=False)
    every = dry_run(job, long_way)
    assert highest(long_way) == highest(simulation)
    assert bytes_of(every) == bytes_of(predicted)
    assert every.series["step/reserved_bytes"] == predicted.series["step/reserved_bytes"]
    assert every.series["step/allocated_bytes"] == predicted.series["step/allocated_bytes"]


@pytest.mark.parametrize("knobs", WINDOWED, ids=str)
def test_every_window_of_a_loop_asks_for_what_an_equal_one_did(
    monkeypatch: pytest.MonkeyPatch, knobs: dict[str, Any]
) -> None:
    job = Job(model="tiny-vace", device="cuda", size="160*96", frame_num=17, sample_steps=1)
    job = job.replace(**{"load_strategy": "part", "rows_at_once": 64, "offload": True, **knobs})
    bodies = 0

    def counted(self: Operations, *args: Any) -> Any:
        nonlocal bodies
        bodies += 1
        return add(self, *args)

    add = (FusedOperations if job.kernels == "fused" else Operations).add
    monkeypatch.setattr(FusedOperations if job.kernels == "fused" else Operations, "add", counted)

    def run() -> tuple[list[Event], dict[str, tuple[object, ...]], dict[str, int | float], int]:
        nonlocal bodies
        bodies, heard, simulation = 0, [], Simulation(H100, Settings())
        simulation.memory.listeners.append(heard.append)
        counted_bytes = bytes_of(dry_run(job, simulation))
        return heard, highest(simulation), counted_bytes, bodies

    *short, few = run()
    monkeypatch.setattr(Replays, "loops", lambda _: nullcontext())
    *long, many = run()
    assert short == long
    assert few < 0.9 * many  # five windows here, of which the last is shorter; of two ranks three each


def test_kernels_of_our_own_pass_through_a_fake_device_and_decoding_asks_for_less() -> None:
    job, peak = TINY.replace(sample_steps=1), "memory/peak/decode/requested_bytes"
    plain, fused = (
        bytes_of(dry_run(job.replace(kernels=kernels), Simulation(H100, Settings()))) for kernels in ("torch", "fused")
    )
    assert fused[peak] < plain[peak]


def test_a_budget_of_host_memory_is_kept_without_reading_anything() -> None:
    job, pinned = TINY.replace(load_strategy="part", offload=True, sample_steps=2), "memory/peak/host_pinned_bytes"
    whole, little = (dry_run(job.replace(host_budget_gib=gib), Simulation(H100, Settings())) for gib in (None, 0.007))
    assert little.metrics[pinned] <= 0.007 * 2**30 < 0.9 * whole.metrics[pinned]
    assert little.series["step/allocated_bytes"] == whole.series["step/allocated_bytes"]
    assert little.error is whole.error is None


def test_more_steps_than_the_first_four_ask_for_no_more() -> None:
    job = TINY.replace(sample_steps=9)
    few, every = (dry_run(job, Simulation(H100, Settings()), most_steps=steps) for steps in (4, 9))
    assert len(few.series["step/allocated_bytes"]) == 4
    assert len(every.series["step/allocated_bytes"]) == 9
    for phase in ("encode_text", "denoise", "decode"):
        name = f"memory/peak/{phase}/requested_bytes"
        assert every.metrics[name] == few.metrics[name]
    # Where tensors lie when denoising ends may differ, and a segment more or less follows from that.
    for name in ("memory/peak/allocated_bytes", "memory/peak/reserved_bytes"):
        assert every.metrics[name] == pytest.approx(few.metrics[name], abs=SMALL_SEGMENT_BYTES)


def test_loads_change_requested_bytes_by_those_of_the_parameters(predicted: DryRun) -> None:
    assert predicted.warnings == []  # the recorder's own check


def test_more_chunks_of_decoding_add_only_what_the_longer_latents_take() -> None:
    num_more_chunks = 3
    runs = [
        dry_run(TINY.replace(frame_num=frames, offload=True, sample_steps=1), Simulation(H100, Settings()))
        for frames in (13, 13 + 4 * num_more_chunks)
    ]
    short, longer = (run.metrics["memory/peak/decode/requested_bytes"] for run in runs)
    latent_frame = 16 * (96 // 8) * (160 // 8) * 4
    # The latents, and what the VAE makes of them before it goes through them frame by frame.
    assert longer - short == 2 * num_more_chunks * latent_frame


def test_the_vae_is_gone_when_the_allocator_lets_go_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = Simulation(H100, Settings())
    empty_cache, left = simulation.runtime.empty_cache, []

    def noted() -> None:
        left.append(simulation.runtime.memory().requested_bytes)
        empty_cache()

    monkeypatch.setattr(simulation.runtime, "empty_cache", noted)
    run = dry_run(TINY.replace(offload=True, frame_num=9, sample_steps=1), simulation)
    assert left[-1] - run.metrics["memory/base/libraries_bytes"] < run.metrics["memory/base/vae_bytes"] / 2


@pytest.mark.parametrize("place", ["device", "host"])
def test_a_load_stages_what_drawing_the_weights_would(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def events(*, is_drawn: bool) -> list[tuple[int, int | None]]:
        simulation = Simulation(H100, Settings())
        spec = MODELS["tiny"]
        seen: list[Event] = []
        with simulation.running():
            with torch.device("meta"):
                model = TextEncoder(spec.text, dtype=torch.bfloat16)
            drawn = RandomWeights(spec, 0, simulation.runtime.generator)
            undrawn = UndrawnWeights(spec, simulation.runtime, simulation.memory)
            simulation.memory.listeners.append(seen.append)
            where = simulation.device if place == "device" else torch.device("cpu")
            materialize(model, drawn.t5() if is_drawn else undrawn.t5(), where)
        return [(event.number, event.holding.num_bytes if isinstance(event, Take) else None) for event in seen]

    monkeypatch.setattr("wan21.weights.source.STAGING_BYTES", 2**17)  # several pieces for each of the larger tensors
    drawn = events(is_drawn=True)
    assert len(drawn) > 200
    assert events(is_drawn=False) == drawn
