"""After the first step nothing new is reserved, no step leaves anything, and all ask for the same in the same order."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from wan21.assets import open_assets
from wan21.models import model_spec
from wan21.options import Options
from wan21.pipeline import VideoPipeline
from wan21.request import make_request
from wan21.runtime import CpuRuntime, Runtime, make_runtime
from wan_sweep.allocator import Settings
from wan_sweep.cards import card_named
from wan_sweep.estimate.dry_run import SILENT_SINK, DryRun, Simulation, dry_run
from wan_sweep.estimate.memory import Event, Take
from wan_sweep.measure.recorder import Recorder
from wan_sweep.schema import Job

NUM_STEPS = 6
TINY = Job(model="tiny", device="cuda", precision="bf16", sample_steps=NUM_STEPS)
LOWEST = TINY.replace(kernels="fused", offload=True, load_strategy="part", attention_slicing=True, vae_precision="bf16")
JOBS = {
    "none": TINY,
    "fastest": TINY.replace(kernels="fused", rows_at_once=131072, share_first_attention=True),
    "lowest_memory": LOWEST,
    "hosted": TINY.replace(kernels="fused", load_strategy="block", residual_on_host=0.5, rows_at_once=32),
    "dpm++": TINY.replace(sample_solver="dpm++"),
    "i2v": TINY.replace(model="tiny-i2v"),
}


@dataclass
class Steps:
    """What a simulated run asks for in each step, and what it leaves behind."""

    simulation: Simulation
    asked: dict[int, list[tuple[int, int, str]]] = field(default_factory=dict)
    left: dict[int, int] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)

    def listen(self, event: Event) -> None:
        step = self.simulation.memory.place.step
        if isinstance(event, Take):
            self.sizes[event.number] = event.holding.num_bytes
        if step is None:
            return
        if isinstance(event, Take):
            self.asked.setdefault(step, []).append((event.stream, event.holding.num_bytes, event.holding.operation))
        sign = 1 if isinstance(event, Take) else -1
        self.left[step] = self.left.get(step, 0) + sign * self.sizes[event.number]


@pytest.fixture(scope="module", params=JOBS)
def simulated(request: pytest.FixtureRequest) -> tuple[DryRun, Steps]:
    settings = Settings(expandable_segments=request.param == "lowest_memory")
    simulation = Simulation(card_named("H100-80GB"), settings, repeats_blocks=False)
    steps = Steps(simulation)
    simulation.memory.listeners.append(steps.listen)
    return dry_run(JOBS[request.param], simulation, most_steps=NUM_STEPS), steps


def test_no_segment_is_reserved_after_the_first_step(simulated: tuple[DryRun, Steps]) -> None:
    run, _ = simulated
    assert run.error is None
    assert len(set(run.series["step/reserved_bytes"])) == 1
    assert run.warnings == []


def test_what_outlives_a_step_leaves_room_for_keys_and_values() -> None:
    # With small chunks nothing else has left a block in which the solver's history would fit.
    job = LOWEST.replace(model="t2v-1.3B", size="832*480", frame_num=17, residual_on_host=1, rows_at_once=1024)
    run = dry_run(job, Simulation(card_named("H100-80GB"), Settings()), most_steps=2)
    assert run.error is None
    first, second = run.series["step/reserved_bytes"]
    assert first == second


def test_no_step_leaves_anything(simulated: tuple[DryRun, Steps]) -> None:
    _, steps = simulated
    assert steps.asked[0]
    assert [steps.left[step] for step in range(NUM_STEPS - 1)] == [0] * (NUM_STEPS - 1)


def test_steps_ask_for_the_same_in_the_same_order(simulated: tuple[DryRun, Steps]) -> None:
    _, steps = simulated
    # The second solves with one estimate of the past, the third with two, which takes four small temporaries more; the
    # last one solves nothing.
    for step in range(3, NUM_STEPS - 1):
        assert steps.asked[2] == steps.asked[step]
    second = iter(steps.asked[2])
    assert all(any(one == other for other in second) for one in steps.asked[1])


def measured(runtime: Runtime, **options: Any) -> Recorder:
    spec, chosen = model_spec("tiny"), Options(**options)
    with runtime.counting():
        runtime.warm_up()
        recorder = Recorder(runtime, SILENT_SINK)
        pipeline = VideoPipeline(spec, chosen, open_assets(spec, chosen, runtime), runtime, recorder)
        pipeline.generate(make_request(spec, seed=7, size="96*64", frame_num=5, num_steps=NUM_STEPS))
    return recorder


@pytest.mark.parametrize(
    "options", [{}, {"load_strategy": "part", "offload": True, "attention_slices": "auto"}], ids=str
)
def test_measured_on_a_cpu_no_step_after_the_second_takes_more(options: dict[str, Any]) -> None:
    recorder = measured(CpuRuntime(), precision="fp32", **options)
    peaks = recorder.series()["step/allocated_bytes"]
    assert len(set(peaks[1:-1])) == 1
    assert peaks[-1] <= peaks[1]
    assert recorder.warnings == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [{}, {"load_strategy": "part", "offload": True, "kernels": "fused"}], ids=str)
def test_measured_on_a_gpu_nothing_is_reserved_after_the_second_step(options: dict[str, Any]) -> None:
    recorder = measured(make_runtime("cuda"), precision="bf16", **options)
    assert len(set(recorder.series()["step/reserved_bytes"][1:])) == 1
    assert recorder.warnings == []
