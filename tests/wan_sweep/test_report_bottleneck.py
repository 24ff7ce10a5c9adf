import json
from pathlib import Path
from typing import Any

import pytest

from tests.wan_sweep.made_up_events import attribution, denoise_peak, item, leave, peak, write_main_sweep
from tests.wan_sweep.made_up_records import MIB, main_job, metrics_of, record, write_sweep
from wan_sweep.errors import RecordError
from wan_sweep.report.attribution import read_attribution
from wan_sweep.report.bottleneck import bottleneck, bottlenecks, remedy
from wan_sweep.report.findings import unmeasured
from wan_sweep.report.sheet import Sheet, read_sheet

NOTHING_RESIDENT = {"t5": 0.0, "dit": 0.0, "vae": 0.0}
TINY = {"t5": 3.0, "dit": 2.0, "vae": 4.0}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Sheet:
    return read_sheet(write_main_sweep(tmp_path_factory.mktemp("whole")))


def sheet_of(folder: Path, *records: dict[str, Any]) -> Sheet:
    return read_sheet(write_sweep(folder, *records))


def test_a_bottleneck_adds_up_and_names_what_the_phase_does_not_need(tmp_path: Path) -> None:
    assert bottlenecks(sheet_of(tmp_path, *main_job()))[1] == (
        "Job 2 (fp16 offload=false): peak 16.58 GiB in denoise: 2.64 GiB dit weights, 11.05 GiB weights not needed in "
        "this phase (t5 10.58 GiB, vae 484.0 MiB), 2.88 GiB activations; next highest: decode at 15.43 GiB; "
        "offload=true (job 1) lowers the peak to 6.00 GiB (-64 %) in the same time within 2 % (+0.8 %)."
    )


def test_an_attribution_names_the_largest_activations(whole: Sheet) -> None:
    assert bottlenecks(whole)[1].startswith(
        "Job 2 (fp16 offload=false): peak 16.58 GiB in denoise: 2.64 GiB dit weights, 11.05 GiB weights not needed in "
        "this phase (t5 10.58 GiB, vae 484.0 MiB), 2.05 GiB in dit block 1's self_attn (aten::_to_copy float64 "
        "[1, 32760, 12, 64]), 822.0 MiB other activations, 32.0 MiB libraries; next highest: decode at 15.43 GiB; "
    )


def test_an_attribution_of_another_peak_names_nothing(tmp_path: Path) -> None:
    jobs = main_job()[:2]
    write_sweep(tmp_path, *jobs)
    other = denoise_peak() | {"allocated_bytes": 9000 * MIB}
    leave(tmp_path, jobs[1], "attribution.json", attribution(other))
    sheet = read_sheet(tmp_path)
    assert "self_attn" not in (bottleneck(sheet.rows[1], sheet) or "")


def test_the_attribution_of_a_job_that_was_taken_over_is_found(tmp_path: Path) -> None:
    older, newer = tmp_path / "older", tmp_path / "newer"
    before = main_job()[1]
    write_sweep(older, before)
    folder = leave(older, before, "attribution.json", attribution(denoise_peak()))
    after = {**before, "outcome": "skipped", "reason": "done before", "measured_in": str(folder)}
    sheet = sheet_of(newer, after)
    assert "2.05 GiB in dit block 1's self_attn" in (bottleneck(sheet.rows[0], sheet) or "")


def test_a_kernels_workspace_is_called_one(tmp_path: Path) -> None:
    made = record(1, {}, metrics_of(base=NOTHING_RESIDENT, activation=60, scale=0.1))
    write_sweep(tmp_path, made)
    live = [item(50, kind="workspace", block=None, module="head", operation="aten::conv", shape=None, dtype=None)]
    leave(tmp_path, made, "attribution.json", attribution(peak("denoise", {}, [*live, item(10, kind="unattributed")])))
    (found,) = bottlenecks(read_sheet(tmp_path))
    assert found == (
        "Job 1 (t2v-1.3B): peak 60.0 MiB in denoise: 50.0 MiB workspace in dit head (aten::conv), 10.0 MiB other "
        "activations; next highest: decode at 36.0 MiB."
    )


def test_a_tensor_is_placed_where_it_was_made(tmp_path: Path) -> None:
    def place(**more: Any) -> str:
        path = tmp_path / "attribution.json"
        path.write_text(json.dumps(attribution(peak("denoise", {}, [item(1, **more)]))))
        return read_attribution(path).peaks[0].live[0].place

    assert place(module="blocks.1.self_attn.q") == "dit block 1's self_attn.q"
    assert place(module="blocks.1") == "dit block 1"
    assert place(component="vae", block=None, module="decoder.head") == "vae decoder.head"
    assert place(component=None, block=None, module="", phase="denoise") == "denoise"
    assert place(kind="weights", parameter="blocks.3.ffn.0.weight") == "dit blocks.3.ffn.0.weight"


def test_without_weights_on_the_device_all_of_a_peak_is_activations(tmp_path: Path) -> None:
    metrics = metrics_of(base=NOTHING_RESIDENT, activation=41, scale=0.1)
    assert bottlenecks(sheet_of(tmp_path, record(1, {"load_strategy": "block"}, metrics))) == [
        "Job 1 (block): peak 41.0 MiB in denoise: 41.0 MiB activations; next highest: decode at 24.6 MiB."
    ]


def test_weights_that_cannot_all_be_there_are_not_claimed(tmp_path: Path) -> None:
    metrics = metrics_of(base={"t5": 0.0, "dit": 2.0, "vae": 0.0}, activation=41, scale=0.1)
    metrics = {name: value for name, value in metrics.items() if "/resident/" not in name}
    sheet = sheet_of(tmp_path, record(1, {}, {**metrics, "memory/base/t5_bytes": 900 * MIB}))
    assert bottlenecks(sheet)[0].startswith("Job 1 (t2v-1.3B): peak 43.0 MiB in denoise: 43.0 MiB activations;")


def test_the_best_remedy_is_the_lowest_peak_that_one_knob_away_gives(tmp_path: Path) -> None:
    lower = {
        n: metrics_of(base=TINY, activation=activation, scale=0.1) for n, activation in ((1, 90), (2, 60), (3, 40))
    }
    sheet = sheet_of(
        tmp_path,
        record(1, {"offload": False, "load_strategy": "full"}, lower[1]),
        record(2, {"offload": True, "load_strategy": "full"}, lower[2]),
        record(3, {"offload": True, "load_strategy": "block"}, lower[3]),
    )
    first, second, third = (remedy(row, sheet) for row in sheet.rows)
    assert first is not None
    assert (first.row.number, first.knob) == (2, "offload")
    assert second is not None
    assert (second.row.number, second.knob) == (3, "load_strategy")
    assert third is None


def test_another_video_is_no_remedy(tmp_path: Path) -> None:
    large, small = (metrics_of(base=TINY, activation=activation) for activation in (90, 40))
    sheet = sheet_of(tmp_path, record(1, {"frame_num": 81}, large), record(2, {"frame_num": 41}, small))
    assert remedy(sheet.rows[0], sheet) is None


@pytest.mark.parametrize(("total_s", "words"), [(15.0, "25.0 % less time"), (25.0, "25.0 % more time")])
def test_a_remedy_that_saves_or_takes_time_says_so(tmp_path: Path, total_s: float, words: str) -> None:
    slow, fast = (metrics_of(base=TINY, activation=size, step_s=size / 40) for size in (80, 40))
    slow, fast = ({**metrics, "memory/peak/encode_text/allocated_bytes": 0} for metrics in (slow, fast))
    slow |= {"memory/peak/allocated_bytes": slow["memory/peak/denoise/allocated_bytes"], "time/total_s": 20.0}
    fast |= {"memory/peak/allocated_bytes": fast["memory/peak/denoise/allocated_bytes"], "time/total_s": total_s}
    sheet = sheet_of(tmp_path, record(1, {"offload": False}, slow), record(2, {"offload": True}, fast))
    assert bottlenecks(sheet)[0].endswith(f"; offload=true (job 2) lowers the peak to 49.0 MiB (-45 %) in {words}.")


def test_an_oom_is_told_with_what_was_asked_for_and_what_filled_the_device(whole: Sheet) -> None:
    assert unmeasured(whole)[0].endswith(
        "; run again to look into it: 1.86 GiB asked for in denoise, step 1, block 1's self_attn (aten::_to_copy) "
        "with 9.86 GiB allocated: 5.29 GiB dit weights, 484.0 MiB vae weights, 4.10 GiB in dit block 1's self_attn "
        "(aten::_to_copy float64 [1, 32760, 12, 64])"
    )


def test_an_oom_that_does_not_tell_what_was_asked_for_is_told_without(tmp_path: Path) -> None:
    made = record(1, {}, outcome="oom", reason="killed by the kernel")
    write_sweep(tmp_path, made)
    failed = peak("denoise", {"dit": 900.0}, [], request_bytes=None, reason="the last moment before it.", module=None)
    leave(tmp_path, made, "attribution.json", attribution(oom=failed | {"block": None, "step": None}))
    assert unmeasured(read_sheet(tmp_path)) == [
        (
            "Job 1 (t2v-1.3B): oom: killed by the kernel; run again to look into it: in denoise (aten::_to_copy) "
            "with 900.0 MiB allocated: 900.0 MiB dit weights (the last moment before it)"
        )
    ]


def test_an_attribution_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "attribution.json"
    path.write_text('{"schema_version": 7}')
    with pytest.raises(RecordError, match=r"attribution\.json: schema_version=7 is not known"):
        read_attribution(path)
