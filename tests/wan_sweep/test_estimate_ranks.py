"""Estimates of jobs of several ranks: which are gone through, what they take, and what is told of them all."""

import gc
import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.wan21.ranks import Ranks, generate
from wan21.errors import UsageError
from wan21.layout import Layout
from wan21.models import MODELS
from wan21.parallel.sharding import fill_shares, shard
from wan21.weights.random import RandomWeights
from wan_sweep.allocator import Settings
from wan_sweep.build import build_layout
from wan_sweep.cards import card_named
from wan_sweep.environment import Machine
from wan_sweep.estimate.dry_run import DryRun, Simulation, dry_run
from wan_sweep.estimate.fake_device import STAND_IN, GuardError
from wan_sweep.estimate.fake_world import fake_world
from wan_sweep.estimate.job import estimate_job
from wan_sweep.estimate.kernel_table import row_for
from wan_sweep.estimate.memory import Event, Take
from wan_sweep.estimate.predict import estimate
from wan_sweep.estimate.ranks import estimate_ranks, ranks_gone_through, seldom_collecting
from wan_sweep.estimate.weights import UndrawnWeights
from wan_sweep.planner.client import ask
from wan_sweep.rules import resolve
from wan_sweep.schema import Job
from wan_sweep.units import MIB

H100 = card_named("H100-80GB")
TINY = Job(model="tiny", device="cuda", frame_num=5, sample_steps=1)
SEGMENT_BYTES = 20 * MIB  # the most that a request below 10 MiB makes the allocator reserve


@cache
def run_rank(job: Job, rank: int, *, repeats_blocks: bool = True) -> DryRun:
    run = dry_run(job, Simulation(H100, Settings(), repeats_blocks=repeats_blocks), rank=rank)
    assert run.error is None
    assert run.warnings == []  # among them that a load changed memory by other than the parameters' bytes
    return run


def bytes_of(run: DryRun) -> dict[str, int | float]:
    return {name: value for name, value in run.metrics.items() if name.startswith("memory/") and "rss" not in name}


SHARED = {
    "fsdp": {"ulysses_size": 2, "ring_size": 2, "dit_fsdp": True, "t5_fsdp": True},
    "streamed": {"ulysses_size": 2, "cfg_parallel": True, "load_strategy": "part", "offload": True},
    "uneven": {"ring_size": 3, "dit_fsdp": True, "t5_fsdp": True},
}


def test_ranks_that_are_not_gone_through_take_what_the_first_of_their_kind_does() -> None:
    job = TINY.replace(ulysses_size=4, ring_size=2)
    like = ranks_gone_through(job)
    assert sorted(like) == list(range(build_layout(job).world_size))
    assert 1 < len(set(like.values())) < len(like)
    found = {rank: bytes_of(run_rank(job, rank)) for rank in like}
    for rank, other in like.items():
        assert found[rank] == found[other]


@pytest.mark.parametrize("knobs", SHARED.values(), ids=list(SHARED))
def test_ranks_with_shares_of_the_weights_ask_for_as_much_and_their_segments_may_differ(knobs: dict[str, Any]) -> None:
    job = TINY.replace(**knobs)
    like = ranks_gone_through(job)
    found = {rank: bytes_of(run_rank(job, rank)) for rank in like}
    assert like[len(like) - 1] == len(like) - 1
    for rank, other in like.items():
        for name, value in found[rank].items():
            if "requested" in name or name.startswith(("memory/base", "memory/peak/host")):
                assert value == found[other][name]
            elif name.endswith("_bytes"):
                assert value == pytest.approx(found[other][name], abs=SEGMENT_BYTES)


def test_a_rank_of_several_halves_what_depends_on_tokens_and_keeps_what_does_not() -> None:
    single, rank = (
        bytes_of(run_rank(TINY.replace(frame_num=81, offload=True, **knobs), 0)) for knobs in ({}, {"ulysses_size": 2})
    )
    assert rank["memory/base/dit_bytes"] == single["memory/base/dit_bytes"]
    # Beside the tokens: latents, and what guidance makes of them, in all five float32 copies, whole on each rank.
    latents = 16 * 21 * (96 // 8) * (160 // 8) * 4
    whole, half = (one["memory/activation/denoise_bytes"] for one in (single, rank))
    assert 0.5 * (whole - 5 * latents) < half < 0.5 * whole + 5 * latents


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    found = Ranks(2)
    yield found
    found.close()


MEASURED = {
    "streamed": ({"load_strategy": "part"}, {"ulysses_size": 2}),
    "fsdp, and the first rank encodes": ({}, {"cfg_parallel": True, "dit_fsdp": True}),
}


@pytest.mark.parametrize(("options", "spread"), MEASURED.values(), ids=list(MEASURED))
def test_weights_of_each_rank_are_those_of_a_measured_run(
    ranks: Ranks, options: dict[str, Any], spread: dict[str, Any]
) -> None:
    job = TINY.replace(precision="fp32", size="96*64", frame_num=5, **options, **spread)
    measured = ranks.run(2, generate, build_layout(job), {"size": job.size}, {"precision": "fp32", **options})
    for rank, told in enumerate(measured):
        metrics = bytes_of(run_rank(job, rank))
        base = {name: metrics.get(f"memory/base/{name}_bytes") for name in ("t5", "dit", "vae")}
        assert {name: value for name, value in base.items() if value is not None} == told["loaded"]
        assert metrics["memory/peak/host_pinned_bytes"] == told["host_bytes"]


def test_fsdp_holds_shares_a_unit_in_use_and_two_that_are_gathered() -> None:
    width, num_units = 256, 4
    of_unit = width * width * 4
    layout = Layout(ulysses=2, dit_fsdp=True)
    simulation = Simulation(H100, Settings())
    runtime = simulation.runtime
    with fake_world(layout, 1, runtime) as world, simulation.running():
        assert world.line is not None
        with torch.device("meta"):
            model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(num_units)))
        shard(model, list(model), line=world.line)
        fill_shares(model, lambda *_: None, runtime.device)
        shares = runtime.memory().requested_bytes
        x = torch.empty(8, width, device=runtime.device)
        runtime.reset_memory_peaks()
        model(x)
        peak = runtime.memory().requested_peak_bytes
        kept = runtime.memory().requested_bytes - x.nbytes - shares
    assert shares == num_units * of_unit // 2
    workspace = H100.cublas_workspace_bytes  # it has come meanwhile
    # Beside the units the caller's input, a layer's, and its result.
    assert peak - shares - workspace == 3 * of_unit + 3 * x.nbytes
    assert kept == workspace


def test_running_every_block_of_fsdp_gives_the_same_bytes_as_repeating_what_is_between_its_hooks() -> None:
    job = TINY.replace(**SHARED["fsdp"])
    every, repeated = bytes_of(run_rank(job, 1, repeats_blocks=False)), bytes_of(run_rank(job, 1))
    assert every == repeated


def test_a_share_of_a_weight_stages_what_drawing_it_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wan21.weights.source.STAGING_BYTES", 2**13)  # several pieces for the table
    spec, name = MODELS["tiny"], "token_embedding.weight"

    def events(first: int, *, is_drawn: bool, on_host: bool) -> list[tuple[int, int | None]]:
        simulation = Simulation(H100, Settings())
        seen: list[Event] = []
        with simulation.running():
            drawn = RandomWeights(spec, 0, simulation.runtime.generator).t5()
            source = drawn if is_drawn else UndrawnWeights(spec, simulation.runtime, simulation.memory).t5()
            place = torch.empty(3000, dtype=torch.bfloat16, device="cpu" if on_host else simulation.device)
            simulation.memory.listeners.append(seen.append)
            source.write_part(name, place, first)
        return [(event.number, event.holding.num_bytes if isinstance(event, Take) else None) for event in seen]

    for first in (0, 1500, 5000):
        for on_host in (False, True):
            drawn = events(first, is_drawn=True, on_host=on_host)
            assert len(drawn) > 4
            assert events(first, is_drawn=False, on_host=on_host) == drawn


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    return estimate_ranks(TINY.replace(ulysses_size=2, offload=True), H100)


def test_the_numbers_of_a_job_are_the_largest_of_its_ranks(told: dict[str, Any]) -> None:
    first, last = (one["metrics"] for one in told["ranks"])
    assert [one["outcome"] for one in told["ranks"]] == ["ok", "ok"]
    assert told["metrics"]["ranks/num"] == 2
    assert told["metrics"]["ranks/peak_rank"] == 0  # it encodes the text
    peak = "memory/peak/encode_text/requested_bytes"
    assert told["metrics"][peak] == first[peak] > last[peak]
    assert told["estimate"]["gone_through"] == {"0": 0, "1": 1}
    for phase, confidence in told["estimate"]["confidence"].items():
        assert confidence["allocated_bytes"] == told["metrics"][f"memory/peak/{phase}/allocated_bytes"]
    assert told["peaks"] == told["peaks_by_rank"]["0"]
    assert json.loads(json.dumps(told)) == told


def test_nccl_is_counted_where_it_was_measured_and_said_to_be_missing_where_not(
    told: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = row_for(H100)[0]
    used, reserved = (f"memory/peak/{name}_bytes" for name in ("device_used", "reserved"))
    if row.nccl_bytes_per_communicator is None:
        assert [warning["code"] for warning in told["warnings"]] == ["nccl_not_counted"]
        assert told["metrics"][used] == told["metrics"][reserved] + row.context_bytes
    counted = replace(row, nccl_bytes_per_communicator=100 * MIB)
    monkeypatch.setattr("wan_sweep.estimate.kernel_table.rows", lambda: (counted,))
    grid = estimate(TINY.replace(ulysses_size=2, ring_size=2), H100, rank=3)
    assert grid["warnings"] == []
    # All, those with the same tokens, heads and keys: a group for each way to speak.
    assert grid["metrics"][used] == grid["metrics"][reserved] + row.context_bytes + 4 * 100 * MIB


def test_a_rank_that_does_not_fit_is_named(tmp_path: Path) -> None:
    job = TINY.replace(cfg_parallel=True, card="H100-80GB", memory_limit_gib=0.05)
    result = estimate_job(tmp_path, job, lambda _: _NoSink())
    assert result["outcome"] == "oom"
    assert result["reason"].startswith("rank 0: does not fit into 51.2 MiB of the H100-80GB: out of memory in")
    assert result["failure"]["rank"] == 0
    attributions = [
        json.loads((tmp_path / name).read_text()) for name in ("attribution.json", "rank1/attribution.json")
    ]
    for attribution, rank in zip(attributions, result["ranks"], strict=True):
        assert attribution["peaks"][0]["allocated_bytes"] == rank["metrics"]["memory/peak/allocated_bytes"]


class _NoSink:
    def write(self, event: dict[str, Any], *, is_urgent: bool) -> None:
        """Keeps nothing."""


def test_several_ranks_are_estimated_on_any_machine_and_not_planned_for() -> None:
    job = Job(model="tiny", mode="estimate", card="H100-80GB", ulysses_size=4, ring_size=2)
    assert resolve(job, Machine()).refusal == ""
    with pytest.raises(UsageError, match=r"ulysses_size=4, ring_size=2 cannot be planned: .* one process"):
        ask(job, H100, vram_bytes=2**33, margin_bytes=0, say=print)


def test_a_stand_in_for_the_card_has_no_process_group_and_says_so() -> None:
    with pytest.raises(GuardError, match=r"ulysses_size=2 cannot be estimated with torch"):
        dry_run(TINY.replace(ulysses_size=2), Simulation(H100, Settings(), device=STAND_IN))


def test_python_looks_for_cycles_as_ever_behind_an_estimate() -> None:
    outer, frozen = gc.get_threshold(), gc.get_freeze_count()
    with seldom_collecting():
        assert outer[0] < gc.get_threshold()[0]
        assert frozen < gc.get_freeze_count()
    assert outer == gc.get_threshold()
    assert gc.get_freeze_count() == 0
