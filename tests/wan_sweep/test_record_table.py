"""scripts/record_table.py: figures, limits and goals, from records made up."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.wan_sweep.made_up_records import GIB, KNOBS, metrics_of, record, write_sweep
from wan21.models import DIT_1_3B, DIT_14B
from wan_sweep.errors import RecordError

RECORD_KNOBS = {"precision": "bf16", "vae_precision": "bf16", "attention_kernel": "sdpa"}
WHOLE = {"t5": 10835.0, "dit": 2706.0, "vae": 242.0}


@pytest.fixture
def goals(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module("record_goals")


@pytest.fixture
def table(goals: ModuleType) -> ModuleType:
    return importlib.import_module("record_table")


def job(
    number: int, preset: str, *, peak: float, step_s: float, decode_s: float = 1.5, **changes: Any
) -> dict[str, Any]:
    """A job of this preset; peak in GiB."""
    knobs = {**KNOBS, **RECORD_KNOBS, "rows_at_once": number, **changes.pop("knobs", {})}
    metrics = metrics_of(base=WHOLE, activation=3000, step_s=step_s)
    metrics |= {"memory/peak/allocated_bytes": peak * GIB, "memory/peak/reserved_bytes": 1.25 * peak * GIB}
    metrics |= {"time/decode_s": decode_s, "fidelity/latents_relative_l2": 1e-3, "fidelity/psnr_db": 55.5}
    metrics |= {"fidelity/is_bit_equal": 0, **changes.pop("metrics", {})}
    compared = {"reference": "1_optimization=none", "reference_folder": "", "reason": ""}
    return record(number, {"optimization": preset}, metrics, knobs=knobs, **{"fidelity": compared, **changes})


def rows(page: str, heading: str) -> list[dict[str, str]]:
    """The table that follows these words, by its heads; of equal heads the first counts."""
    lines = page[page.index(heading) :].splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("|"))
    found = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        found.append([cell.strip().replace("\\", "") for cell in line.strip("|").split(" | ")])
    head, _, *bodies = found
    return [dict(reversed(list(zip(head, body, strict=True)))) for body in bodies]


def test_a_row_holds_the_records_figures_and_compares_with_the_shortest(table: ModuleType, tmp_path: Path) -> None:
    sweep = write_sweep(
        tmp_path / "sweep",
        job(1, "none", peak=20, step_s=1.2, decode_s=2.0),
        job(2, "lowest_memory", peak=0.875, step_s=0.96, decode_s=1.6),
        job(3, "fastest", peak=18, step_s=0.8, decode_s=1.0),
    )
    plain, lowest, fastest = rows(table.page([sweep]), "# The record")
    assert lowest["preset"] == "lowest_memory"
    assert lowest["peak allocated GiB"] == "0.88"
    assert lowest["peak reserved GiB"] == "1.09"
    assert [row["forward s"] for row in (plain, lowest, fastest)] == ["0.600", "0.480", "0.400"]
    assert [row["x least"] for row in (plain, lowest, fastest)] == ["1.50", "1.20", "1.00"]
    assert lowest["latents relative L2"] == "1.00e-03"
    assert lowest["video dB"] == "55.5"
    assert lowest["allocator"] == "expandable_segments:True"


def test_goals_say_what_was_reached_and_by_how_much_not(table: ModuleType, tmp_path: Path) -> None:
    sweep = write_sweep(
        tmp_path / "sweep",
        job(1, "lowest_memory", peak=1.1, step_s=0.96, decode_s=1.4),
        job(2, "fastest", peak=18, step_s=0.8, decode_s=1.0),
    )
    told = {(row["preset"], row["figure"]): row for row in rows(table.page([sweep]), "## Goals")}
    assert told["lowest_memory", "peak allocated GiB"]["reached"] == "no, 10 % more"
    assert told["lowest_memory", "forward x least"]["measured"] == "1.20"
    assert told["lowest_memory", "forward x least"]["reached"] == "no, 14 % more"
    assert told["lowest_memory", "decode x least"]["reached"] == "yes"
    assert told["fastest", "forward s"]["at most"] == "0.480"
    assert told["fastest", "forward s"]["reached"] == "yes"


def test_the_goal_of_a_forward_is_that_of_its_attention_kernel(table: ModuleType, tmp_path: Path) -> None:
    fa3 = {"attention_kernel": "fa3"}
    sweep = write_sweep(
        tmp_path / "sweep",
        job(1, "none", peak=18, step_s=1.0),
        job(2, "fastest", peak=18, step_s=0.9, knobs=fa3),
    )
    (forward,) = [row for row in rows(table.page([sweep]), "## Goals") if row["figure"] == "forward s"]
    assert (forward["at most"], forward["reached"]) == ("0.430", "no, 5 % more")


def test_another_card_or_length_has_neither_goals_nor_limits(
    table: ModuleType, goals: ModuleType, tmp_path: Path
) -> None:
    other = record(1, {})["environment"] | {"gpu": "NVIDIA A100-SXM4-80GB"}
    sweep = write_sweep(tmp_path / "card", job(1, "lowest_memory", peak=0.9, step_s=1, environment=other))
    assert "## Goals" not in table.page([sweep])
    (line,) = goals.read_lines([sweep])
    assert goals.forward_limit(line) is None
    assert goals.decode_limit(line) is None
    shorter = write_sweep(tmp_path / "length", job(1, "lowest_memory", peak=0.9, step_s=1, knobs={"frame_num": 49}))
    assert "## Goals" not in table.page([shorter])
    (line,) = goals.read_lines([shorter])
    assert goals.forward_limit(line) is None


def test_limits_agree_with_those_worked_out_by_hand(goals: ModuleType, tmp_path: Path) -> None:
    sweep = write_sweep(
        tmp_path / "sweep",
        job(1, "fastest", peak=18, step_s=1),
        job(2, "fastest", peak=18, step_s=1, knobs={"model": "t2v-14B", "size": "1280*720", "attention_kernel": "fa3"}),
    )
    small, large = goals.read_lines([sweep])
    # 30 blocks of 4 * 32760 * 33272 * 1536 at 613 and 2 * (6 * 1536**2 + 2 * 1536 * 8960) * 32760 at 790 TFLOP/s.
    assert goals.forward_limit(small) == pytest.approx(0.328 + 0.104, abs=0.001)
    assert goals.forward_limit(large) == pytest.approx(6.952 + 2.288, abs=0.01)
    # 283 and 654 TFLOP at 513 TFLOP/s.
    assert goals.decode_limit(small) == pytest.approx(0.552, abs=0.005)
    assert goals.decode_limit(large) == pytest.approx(1.274, abs=0.005)


def test_work_grows_as_the_formulas_say(goals: ModuleType) -> None:
    attention, products = goals.forward_work(DIT_14B, 75_600)
    assert goals.forward_work(DIT_14B, 151_200)[1] == 2 * products
    assert goals.forward_work(DIT_14B, 151_200)[0] / attention == pytest.approx(4, rel=0.01)
    assert goals.forward_work(DIT_1_3B, 75_600)[0] * 40 * 5120 == attention * 30 * 1536


def test_several_sweeps_stand_in_one_table_and_compare_with_each_other(table: ModuleType, tmp_path: Path) -> None:
    default = record(1, {})["environment"] | {"allocator": "default"}
    one = write_sweep(tmp_path / "one", job(1, "fastest", peak=18, step_s=0.8))
    two = write_sweep(tmp_path / "two", job(1, "lowest_memory", peak=18, step_s=1.6, environment=default))
    found = rows(table.page([one, two]), "# The record")
    assert [row["allocator"] for row in found] == ["expandable_segments:True", "default"]
    assert [row["x least"] for row in found] == ["1.00", "2.00"]


def test_a_single_configuration_and_an_approximate_one_are_no_measure(table: ModuleType, tmp_path: Path) -> None:
    alone = write_sweep(tmp_path / "alone", job(1, "lowest_memory", peak=18, step_s=0.8))
    told = {row["figure"]: row for row in rows(table.page([alone]), "## Goals")}
    assert told["forward x least"]["reached"] == "not measured"
    eight = job(3, "fastest_fp8", peak=18, step_s=0.4, knobs={"linear_format": "fp8"})
    both = write_sweep(
        tmp_path / "both", job(1, "fastest", peak=18, step_s=0.8), job(2, "none", peak=18, step_s=1), eight
    )
    assert [row["x least"] for row in rows(table.page([both]), "# The record")] == ["1.00", "1.25", "0.50"]


def test_goals_hold_on_an_h200_and_the_table_says_so(table: ModuleType, tmp_path: Path) -> None:
    h200 = record(1, {})["environment"] | {"gpu": "NVIDIA H200"}
    here = table.page([write_sweep(tmp_path / "h200", job(1, "fastest", peak=18, step_s=0.8, environment=h200))])
    assert "stated for one H100; here it was NVIDIA H200. The processor" in here
    assert any((row["figure"], row["reached"]) == ("forward s", "yes") for row in rows(here, "## Goals"))
    there = table.page([write_sweep(tmp_path / "h100", job(1, "fastest", peak=18, step_s=0.8))])
    assert "here it was NVIDIA H100 80GB HBM3." in there
    assert "The processor" not in there


def test_a_sweep_of_one_preset_is_known_by_its_name(goals: ModuleType, tmp_path: Path) -> None:
    made = job(1, "fastest", peak=18, step_s=0.8) | {"overrides": {}}
    named = write_sweep(tmp_path / "one", made | {"sweep": {**made["sweep"], "name": "fastest"}})
    assert goals.read_lines([named])[0].preset == "fastest"
    other = write_sweep(tmp_path / "two", made | {"sweep": {**made["sweep"], "name": "mine"}})
    assert not goals.read_lines([other])[0].preset


def test_a_preset_with_the_residual_on_the_host_is_told_from_the_one_without(table: ModuleType, tmp_path: Path) -> None:
    sweep = write_sweep(
        tmp_path / "sweep",
        job(1, "lowest_memory", peak=3.6, step_s=1),
        job(2, "lowest_memory", peak=2.5, step_s=1, knobs={"residual_on_host": 1.0}),
    )
    presets = [row["preset"] for row in rows(table.page([sweep]), "# The record")]
    assert presets == ["lowest_memory", "lowest_memory, residual_on_host=1"]
    told = {
        row["preset"]: row for row in rows(table.page([sweep]), "## Goals") if row["figure"] == "peak allocated GiB"
    }
    assert told["lowest_memory, residual_on_host=1"]["measured"] == "2.50"


def test_latents_count_only_against_the_plain_run(goals: ModuleType, tmp_path: Path) -> None:
    other = {"reference": "1_optimization=fastest", "reference_folder": "", "reason": ""}
    sweep = write_sweep(
        tmp_path / "sweep",
        job(1, "balanced", peak=18, step_s=0.8),
        job(2, "lowest_memory", peak=1, step_s=1, fidelity=other),
    )
    assert [goals.LATENTS.read(line) for line in goals.read_lines([sweep])] == [1e-3, None]


def test_jobs_that_ran_side_by_side_on_one_host_are_counted(table: ModuleType, tmp_path: Path) -> None:
    spans = (("21:01:05", "21:02:00"), ("21:01:30", "21:02:30"), ("21:02:30", "21:03:00"))
    jobs = [
        job(number, "fastest", peak=18, step_s=1)
        | {"started_at": f"2026-11-23T{begin}+00:00", "ended_at": f"2026-11-23T{end}+00:00"}
        for number, (begin, end) in enumerate(spans, 1)
    ]
    assert "- 2 of the jobs ran while another" in table.page([write_sweep(tmp_path / "both", *jobs)])
    assert "ran while another" not in table.page([write_sweep(tmp_path / "turns", *jobs[1:])])


def test_a_job_without_numbers_is_a_row_with_its_reason(table: ModuleType, tmp_path: Path) -> None:
    failed = record(
        2, {"optimization": "none"}, knobs={**KNOBS, **RECORD_KNOBS}, outcome="oom", reason="no room in load"
    )
    sweep = write_sweep(tmp_path / "sweep", job(1, "fastest", peak=18, step_s=0.8), failed)
    page = table.page([sweep])
    assert rows(page, "# The record")[1]["outcome"] == "oom"
    assert "t2v-1.3B 832*480 none, VAE bf16: no room in load" in page


def test_a_folder_without_records_is_refused(table: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="holds no records; name the folder of a sweep"):
        table.page([tmp_path])
