"""Which runs a job is made of."""

import pytest

from wan_sweep.launch import Result
from wan_sweep.passes import extra_passes
from wan_sweep.schema import Job

MEASURED = {"metrics": {}}


@pytest.mark.parametrize(
    ("job", "outcome", "expected"),
    [
        (Job(), "ok", []),
        (Job(profile_memory=True), "ok", ["attribution"]),
        (Job(snapshot=True), "ok", ["attribution"]),
        (Job(profile_memory=True, trace=True), "ok", ["attribution", "trace"]),
        (Job(trace=True), "failed", []),
        (Job(profile_memory=True), "timeout", []),
        (Job(), "oom", ["attribution"]),
        (Job(trace=True), "oom", ["attribution"]),
    ],
)
def test_extra_passes_follow_what_was_asked_and_what_happened(job: Job, outcome: str, expected: list[str]) -> None:
    result = Result(outcome=outcome, measurement=MEASURED)  # type: ignore[arg-type]
    assert [one.name for one in extra_passes(job, result)] == expected


def test_a_job_that_ran_out_of_memory_before_it_could_say_so_is_not_run_again() -> None:
    assert extra_passes(Job(), Result(outcome="oom")) == []
