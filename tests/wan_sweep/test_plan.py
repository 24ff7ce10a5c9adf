import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from wan_sweep.convert import Candidate
from wan_sweep.environment import Gpu, Machine
from wan_sweep.plan import Plan, make_plan
from wan_sweep.preview import print_plan
from wan_sweep.record import Outcome, Record
from wan_sweep.schema import Job, Scalar, asked_key
from wan_sweep.store import PLAN_FILE, write_record

NO_GPU = Machine(torch_version="2.13.0+cpu")
H100 = Gpu(name="NVIDIA H100", total_bytes=80 * 2**30, used_bytes=0)
ONE_GPU = Machine(gpus=(H100,), torch_version="2.13.0")


def candidate(**knobs: Scalar) -> Candidate:
    return Candidate(job=Job(model="tiny", device="cpu").replace(**knobs), axes=knobs)


def planned(candidates: Sequence[Candidate], root: Path, *, machine: Machine = NO_GPU, code: str = "c0de") -> Plan:
    candidates = [replace(one, job=one.job.replace(output_root=str(root))) for one in candidates]
    return make_plan(
        candidates,
        folder=root / "sweep" / "stamp",
        sample=candidates[0].job,
        machine=machine,
        environment={"fingerprint": "f00"},
        code_version=code,
    )


def leave_record(plan: Plan, root: Path, *, outcome: Outcome = "ok", kind: str = "exit") -> Path:
    entry = plan.jobs[0]
    folder = root / "sweep" / "earlier" / entry.name
    record = Record(
        key=entry.key,
        number=entry.number,
        name=entry.name,
        sweep_name="sweep",
        sweep_id="earlier",
        sweep_folder=str(folder.parent),
        knobs=entry.job.to_dict(),
        overrides={},
        outcome=outcome,
        failure={"kind": kind},
        started_at="2026-11-23T10:00:00+00:00",
        ended_at="2026-11-23T10:00:09+00:00",
        code_version=plan.code_version,
        environment=plan.environment,
    )
    write_record(folder, record)
    (folder.parent / PLAN_FILE).touch()
    return folder


def test_jobs_are_numbered_and_named_by_what_differs(tmp_path: Path) -> None:
    plan = planned([candidate(precision="fp16"), candidate(precision="bf16")], tmp_path)
    assert [(job.number, job.name, job.expected) for job in plan.jobs] == [
        (1, "1_precision=fp16", "run"),
        (2, "2_precision=bf16", "run"),
    ]


def test_a_duplicate_has_no_number_of_its_own(tmp_path: Path) -> None:
    plan = planned([candidate(sample_steps=4), candidate(sample_steps=2), candidate(sample_steps=None)], tmp_path)
    assert [job.expected for job in plan.jobs] == ["run", "run", "duplicate"]
    assert [job.number for job in plan.jobs] == [1, 2, 1]
    assert plan.jobs[2].reason == "the same as job 1"
    assert [job.number for job in plan.own_jobs] == [1, 2]


def test_a_refused_job_does_not_stop_the_others(tmp_path: Path) -> None:
    plan = planned([candidate(frame_num=80), candidate(frame_num=9)], tmp_path)
    assert [job.expected for job in plan.jobs] == ["refused", "run"]
    assert "frame_num=80" in plan.jobs[0].reason


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = planned([candidate(precision="fp16"), candidate(frame_num=80)], tmp_path)
    assert plan == Plan.from_json(plan.to_json())


def test_a_task_finds_its_entry_by_what_was_asked(tmp_path: Path) -> None:
    asked = Candidate(job=Job(output_root=str(tmp_path), device="cpu"))
    plan = planned([asked], tmp_path)
    entry = plan.find(asked_key(asked.job, 0))
    assert entry is not None
    assert entry.job.model == "tiny"
    assert plan.find(asked_key(asked.job, 1)) is None


def test_a_job_done_before_is_not_run_again(tmp_path: Path) -> None:
    folder = leave_record(planned([candidate()], tmp_path), tmp_path)
    entry = planned([candidate()], tmp_path).jobs[0]
    assert ("done", str(folder)) == (entry.expected, entry.source)
    assert entry.reason == f"done before in {folder}"


def test_resume_false_runs_everything(tmp_path: Path) -> None:
    leave_record(planned([candidate()], tmp_path), tmp_path)
    assert planned([candidate(resume=False)], tmp_path).jobs[0].expected == "run"


def test_changed_code_runs_again_and_says_why(tmp_path: Path) -> None:
    leave_record(planned([candidate()], tmp_path), tmp_path)
    entry = planned([candidate()], tmp_path, code="newer").jobs[0]
    assert entry.expected == "run"
    assert entry.reason.startswith("run again: the code has changed since ")


def test_a_changed_machine_runs_again_and_says_why(tmp_path: Path) -> None:
    plan = planned([candidate()], tmp_path)
    leave_record(replace(plan, environment={"fingerprint": "ba5"}), tmp_path)
    entry = planned([candidate()], tmp_path).jobs[0]
    assert entry.reason.startswith("run again: the machine or its software has changed since ")


@pytest.mark.parametrize(
    ("outcome", "kind", "retry_failed", "expected"),
    [
        ("oom", "oom", True, "run"),
        ("oom", "oom", False, "done"),
        ("timeout", "limit", False, "done"),
        ("failed", "exit", False, "done"),
        ("failed", "interrupted", False, "run"),
        ("refused", "exit", False, "run"),
        ("skipped", "exit", False, "run"),
    ],
)
def test_what_was_not_ok_runs_again_unless_told(
    tmp_path: Path, outcome: Outcome, kind: str, expected: str, *, retry_failed: bool
) -> None:
    leave_record(planned([candidate()], tmp_path), tmp_path, outcome=outcome, kind=kind)
    assert expected == planned([candidate(retry_failed=retry_failed)], tmp_path).jobs[0].expected


@pytest.mark.parametrize(
    ("machine", "knobs", "notes"),
    [
        (
            NO_GPU,
            {},
            (
                "model=auto is t2v-1.3B: the jobs are estimated.",
                (
                    "Estimated for the H100-80GB, not measured; another card: card=NAME; a real run on this machine's "
                    "CPU: model=tiny device=cpu."
                ),
            ),
        ),
        (
            NO_GPU,
            {"card": "RTX4060-8GB"},
            (
                "model=auto is t2v-1.3B: the jobs are estimated.",
                "Estimated for the RTX4060-8GB, not measured.",
            ),
        ),
        (NO_GPU, {"mode": "measure"}, ("model=auto is tiny: the job runs on the CPU.",)),
        (ONE_GPU, {}, ("model=auto is t2v-1.3B: the job runs on the NVIDIA H100.",)),
        (ONE_GPU, {"device": "cpu"}, ("model=auto is tiny: the job runs on the CPU.",)),
        (
            ONE_GPU,
            {"mode": "estimate"},
            (
                "model=auto is t2v-1.3B: the jobs are estimated.",
                "Estimated for the H100-80GB, not measured; that is the GPU here, and card=NAME names another.",
            ),
        ),
        (
            Machine(gpus=(H100,), torch_version="2.13.0+cpu"),
            {},
            (
                "model=auto is t2v-1.3B: the jobs are estimated.",
                (
                    "Estimated for the H100-80GB, not measured, since torch 2.13.0+cpu cannot use the NVIDIA H100 that "
                    "is here."
                ),
            ),
        ),
    ],
)
def test_the_plan_says_which_model_auto_is_and_for_which_card(
    tmp_path: Path, machine: Machine, knobs: dict[str, Scalar], notes: tuple[str, ...]
) -> None:
    asked = Candidate(job=Job(**knobs), axes=knobs)  # type: ignore[arg-type]
    assert notes == planned([asked], tmp_path, machine=machine).notes


def test_the_printed_plan_shows_each_job_and_each_reason(tmp_path: Path) -> None:
    plan = planned([candidate(frame_num=9), candidate(frame_num=80), candidate(frame_num=9)], tmp_path)
    console = Console(width=100, record=True, file=io.StringIO())
    print_plan(plan, console)
    lines = [line.rstrip() for line in console.export_text().splitlines() if line.strip()]
    assert lines == [
        "sweep sweep stamp: 1 to run, 1 refused, 1 duplicate",
        "  job   frame_num   expected",
        " " + "─" * 34,
        "    1   9           run",
        "    2   80          refused",
        "    1   9           duplicate of 1",
        "job 2: refused: frame_num=80 is not of the form 4n+1, which the VAE needs; choose 77 or 81",
    ]


def test_a_plan_that_is_too_wide_breaks_names_and_cuts_values_but_no_word_of_its_head(tmp_path: Path) -> None:
    knobs: dict[str, Scalar] = {
        "attention_slicing": True,
        "load_strategy": "block",
        "prompt": "A kite above the harbour " * 4,
    }
    console = Console(width=60, record=True, file=io.StringIO())
    print_plan(planned([candidate(**knobs)], tmp_path), console)
    shown = console.export_text()
    assert "\u2026" not in shown
    assert all(word in shown for word in ("attention_", "slicing", "strategy", "A kite above", "expected"))


def test_on_two_gpus_the_plan_tells_which_splits_run_and_why_another_does_not(tmp_path: Path) -> None:
    two_gpus = Machine(gpus=(H100, H100), torch_version="2.13.0")
    sizes = [{"ulysses_size": ulysses, "ring_size": ring} for ulysses in (1, 2) for ring in (1, 2)]
    splits = [Candidate(job=Job(model="t2v-1.3B").replace(**one), axes=one) for one in sizes]
    console = Console(file=io.StringIO(), width=100)
    print_plan(planned(splits, tmp_path, machine=two_gpus), console)
    shown = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert shown[0].endswith("3 to run, 1 refused")
    assert [line for line in shown if line[:1].isdigit()] == ["1 1 1 run", "2 1 2 run", "3 2 1 run", "4 2 2 refused"]
    assert shown[-1] == (
        "job 4: refused: ulysses_size=2, ring_size=2 needs 4 GPUs, this machine has 2; "
        "choose sizes whose product is at most 2"
    )


def test_what_was_chosen_for_a_card_has_to_keep_the_rules_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = {"load_strategy": "block"}
    monkeypatch.setattr("wan_sweep.plan.chosen_for", lambda *_: (chosen, "chosen"))
    jobs = [candidate(device="auto", mode="estimate", vram_gib=8.0, host_budget_gib=gib) for gib in (0.001, 1.0)]
    small, enough = planned(jobs, tmp_path).jobs
    assert (enough.expected, enough.job.load_strategy) == ("run", "block")
    assert small.expected == "refused"
    assert "host_budget_gib=0.001 is too little: with load_strategy=block dit needs" in small.reason
