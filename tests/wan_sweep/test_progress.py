import io

from rich.console import Console

from wan_sweep.launch.events import Event
from wan_sweep.progress import Estimate, LiveDisplay, PlainDisplay, make_display


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def step(event: str, index: int, total: int = 4) -> Event:
    return Event(event="begin" if event == "begin" else "end", kind="step", name="step", index=index, total=total)


def test_nothing_is_estimated_without_something_to_go_by() -> None:
    estimate = Estimate(3, Clock())
    assert estimate.remaining_s is None
    estimate.start_job()
    estimate.event(step("end", 0))
    assert estimate.remaining_s is None
    assert str(estimate) == ""


def test_the_first_job_is_estimated_from_its_steps() -> None:
    clock = Clock()
    estimate = Estimate(2, clock)
    estimate.start_job()
    clock.now += 5  # loading and the first step
    estimate.event(step("end", 0))
    clock.now += 1
    estimate.event(step("end", 1))
    assert estimate.remaining_s == 2 + 8  # two steps; then a whole job of 5 + 3 seconds


def test_nothing_is_told_of_the_extra_passes_of_the_first_job() -> None:
    clock = Clock()
    estimate = Estimate(2, clock)
    estimate.start_job()
    for index in range(4):
        clock.now += 1
        estimate.event(step("end", index))
    assert estimate.remaining_s == 4
    estimate.start_pass()
    assert estimate.remaining_s is None
    clock.now += 16
    estimate.end_job()
    assert estimate.remaining_s == 20


def test_later_jobs_are_estimated_from_those_that_are_done() -> None:
    clock = Clock()
    estimate = Estimate(3, clock)
    for seconds in (4, 6):
        estimate.start_job()
        clock.now += seconds
        estimate.end_job()
    assert estimate.remaining_s == 5
    estimate.start_job()
    clock.now += 2
    assert str(estimate) == "about 3.00 s left"
    clock.now += 60
    assert estimate.remaining_s == 0
    estimate.end_job()
    assert estimate.remaining_s is None


def test_without_a_terminal_there_are_few_lines() -> None:
    clock, out = Clock(), io.StringIO()
    display = PlainDisplay(2, 2, Console(file=out, width=80), clock)
    display.start_job(1, "precision=fp16")
    for index in range(4):
        display.event(Event(event="begin", kind="phase", name="denoise"))
        display.event(step("begin", index))
        display.event(step("end", index))
        clock.now += 6
    display.end_job(1, "precision=fp16", "oom", "out of memory in denoise, " + "x" * 80, 24.0)
    display.start_job(2, "precision=bf16")
    display.close()
    assert out.getvalue().splitlines() == [
        "job 1 of 2: precision=fp16",
        "  denoise, about 24.0 s left",
        "  job 1 precision=fp16: oom in 24.0 s - out of memory in denoise, " + "x" * 80,
        "job 2 of 2: precision=bf16 (about 24.0 s left)",
    ]


def test_on_a_terminal_the_display_follows_job_phase_and_step() -> None:
    out = io.StringIO()
    display = make_display(2, 1, Console(file=out, force_terminal=True, width=100))
    assert isinstance(display, LiveDisplay)
    display.start_job(2, "precision=fp16")
    display.event(Event(event="begin", kind="phase", name="load"))
    display.event(Event(event="begin", kind="component", name="dit"))
    display.event(Event(event="begin", kind="phase", name="denoise"))
    display.event(step("begin", 1))
    display._live.refresh()
    display.end_job(2, "precision=fp16", "ok", "", 3.0)
    display.close()
    shown = out.getvalue()
    assert "job 2 of 2" in shown
    assert "denoise, step 2 of 4" in shown
    assert "3.00 s" in shown


def test_where_nobody_knows_the_number_of_jobs_none_is_shown() -> None:
    out = io.StringIO()
    make_display(0, 0, Console(file=out, width=80)).start_job(3, "x")
    assert out.getvalue() == "job 3: x\n"
