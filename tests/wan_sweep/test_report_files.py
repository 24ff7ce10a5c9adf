import csv
import io
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image
from rich.console import Console

from tests.wan_sweep.made_up_events import write_main_sweep
from tests.wan_sweep.made_up_records import KNOBS, metrics_of, record, write_sweep
from wan_sweep.report import print_summary, write_reports, write_table
from wan_sweep.report.__main__ import main
from wan_sweep.report.labels import Box, place
from wan_sweep.report.reproduce import commands
from wan_sweep.report.sheet import read_sheet

GOLDEN = Path(__file__).parents[1] / "data"
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_main_sweep(tmp_path_factory.mktemp("sweep"))
    write_reports(folder)
    return folder


def printed(folder: Path, width: int) -> str:
    buffer = io.StringIO()
    print_summary(folder, Console(file=buffer, width=width, highlight=False))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def test_the_summary_reads_as_stored(sweep: Path) -> None:
    assert printed(sweep, 160) == (GOLDEN / "report_summary.txt").read_text("utf-8")


def test_no_number_is_cut_where_long_names_and_words_meet_a_narrow_terminal(tmp_path: Path) -> None:
    swept = {
        "precision": "fp16",
        "load_strategy": "block",
        "attention_slicing": False,
        "prompt": "A paper kite above the harbour",
    }
    jobs = [
        record(1, swept, metrics_of(base={"dit": 2.0}, activation=81.4)),
        record(2, {**swept, "prompt": "A boat"}, metrics_of(base={"dit": 2.0}, activation=91.4)),
    ]
    table = printed(write_sweep(tmp_path, *jobs), 80).split("\n\n")[0].partition("\nNot enough room")[0]
    head, _, first, second = table.splitlines()[-4:]
    assert max(map(len, (head, first, second))) <= 80
    assert "\u2026" not in head + first + second
    assert first.split()[-2:] == ["120.0", "0.950"]
    assert "A paper" in first


def test_the_report_reads_as_stored(sweep: Path) -> None:
    assert (sweep / "report.md").read_text("utf-8") == (GOLDEN / "report.md").read_text("utf-8")


def test_a_narrow_terminal_gets_fewer_columns_and_none_cut(sweep: Path) -> None:
    *table, told, end = printed(sweep, 80).split("\n\n")[0].splitlines()
    assert max(map(len, (*table, told, end))) <= 80
    assert "reserved" not in " ".join(table)
    assert any("outcome" in line for line in table)
    assert f"{told} {end}" == (
        "Not enough room for process GiB, base GiB, reserved GiB, fidelity dB; report.md has them"
    )


def test_where_all_columns_have_room_nothing_is_said_of_it(sweep: Path) -> None:
    assert "Not enough room" not in printed(sweep, 160)


def test_pictures_are_pictures(sweep: Path) -> None:
    for name in ("peak_memory.png", "memory_time.png", "timelines.png", "steps.png"):
        assert (sweep / name).read_bytes()[:4] == PNG
        with Image.open(sweep / name) as picture:
            assert picture.width > 800
    assert not list(sweep.glob(".*"))


def test_a_sweep_without_numbers_has_a_report_and_no_pictures(tmp_path: Path) -> None:
    write_sweep(tmp_path, record(1, {}, outcome="failed", reason="ValueError: broken"))
    write_reports(tmp_path)
    text = (tmp_path / "report.md").read_text("utf-8")
    assert "failed: ValueError: broken" in text
    assert "![" not in text
    assert not list(tmp_path.glob("*.png"))


def test_results_have_the_metrics_as_tracked(sweep: Path) -> None:
    write_table(sweep)
    rows = list(csv.DictReader(io.StringIO((sweep / "results.csv").read_text("utf-8"))))
    assert list(rows[0])[:5] == ["job", "outcome", "reason", "precision", "offload"]
    assert [row["outcome"] for row in rows] == ["ok", "ok", "ok", "ok", "oom", "refused"]
    assert float(rows[0]["memory/peak/allocated_mib"]) == pytest.approx(6144)
    assert rows[0]["time/step_s"] == "0.97"
    assert rows[4]["memory/peak/allocated_mib"] == ""
    assert rows[4]["reason"].startswith("out of memory in denoise")
    assert [row["fidelity/psnr_db"] for row in rows] == ["", "", "41.27", "41.27", "", ""]
    assert [row["fidelity/is_bit_equal"] for row in rows] == ["", "1", "0", "0", "", ""]


def test_a_full_rewrite_comes_from_files_alone(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = ["report.md", "report.html", "results.csv", *(str(path.relative_to(sweep)) for path in sweep.rglob("*.png"))]
    before = {name: (sweep / name).read_bytes() for name in made}
    assert len(before) == 9
    for name in made:
        (sweep / name).unlink()
    assert main([str(sweep)]) == 0
    assert {name: (sweep / name).read_bytes() for name in made} == before
    assert "Least memory: job 1" in capsys.readouterr().out


def test_a_folder_without_records_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert f"sweep_dir={tmp_path}" in capsys.readouterr().err


def test_a_terminal_shows_the_first_of_many_bottlenecks_and_every_reason(tmp_path: Path) -> None:
    metrics = metrics_of(base={"t5": 3.0, "dit": 2.0, "vae": 4.0}, activation=41)
    jobs = [record(number, {"base_seed": number}, metrics) for number in range(1, 12)]
    failed = [record(number, {"base_seed": number}, outcome="failed", reason="broken") for number in range(12, 24)]
    words = printed(write_sweep(tmp_path, *jobs, *failed), 160)
    assert "  and 3 more in report.md\n" in words
    assert words.count(": failed: broken") == 12


def test_a_full_grid_is_one_command(sweep: Path) -> None:
    (command,) = commands(read_sheet(sweep))
    assert command.startswith("python -m wan_sweep -m precision=fp16,bf16,fp32 offload=true,false model=t2v-1.3B ")
    assert "output_root" not in command


def test_a_part_of_a_grid_is_a_command_for_each_job(tmp_path: Path) -> None:
    jobs = [record(1, {"precision": "fp16", "offload": True}), record(2, {"precision": "bf16", "offload": False})]
    found = commands(read_sheet(write_sweep(tmp_path, *jobs)))
    assert [" -m " in command.removeprefix("python -m wan_sweep") for command in found] == [False, False]
    assert "precision=bf16 offload=false" in found[1]


def test_what_follows_from_a_swept_knob_is_asked_for_job_by_job(tmp_path: Path) -> None:
    sizes = {"t2i-14B": "1024*1024", "i2v-14B": "1280*720"}
    jobs = [
        record(number, {"model": model}, knobs={**KNOBS, "model": model, "size": size})
        for number, (model, size) in enumerate(sizes.items(), 1)
    ]
    found = commands(read_sheet(write_sweep(tmp_path, *jobs)))
    assert [[word for word in shlex.split(one) if word.startswith(("model", "size"))] for one in found] == [
        [f"model={model}", f"size={size}"] for model, size in sizes.items()
    ]


def test_a_refused_job_of_undecided_knobs_leaves_a_grid_one_command(tmp_path: Path) -> None:
    refused = record(1, {"precision": "fp32"}, outcome="refused", knobs={**KNOBS, "precision": "fp32", "size": None})
    (command,) = commands(read_sheet(write_sweep(tmp_path, refused, record(2, {"precision": "fp16"}))))
    assert " -m precision=fp32,fp16 " in command
    assert "'size=832*480'" in command


def test_a_prompt_comes_back_as_hydra_reads_it(tmp_path: Path) -> None:
    prompt = """A "big", black cat's {box} = 1\\2"""
    knobs: dict[str, Any] = {**KNOBS, "prompt": prompt}
    (command,) = commands(read_sheet(write_sweep(tmp_path, record(1, {}, knobs=knobs))))
    (words,) = (word for word in shlex.split(command) if word.startswith("prompt="))
    assert OverridesParser.create().parse_override(words).value() == prompt


def test_labels_do_not_cover_each_other_or_points() -> None:
    points = [(100.0, 100.0), (103.0, 101.0), (300.0, 100.0), (302.0, 98.0)]
    frame = Box(left=0, bottom=0, width=400, height=200)
    boxes = place(points, [(90.0, 12.0)] * 4, frame, radius=5)
    marks = [Box(left=x - 5, bottom=y - 5, width=10, height=10) for x, y in points]
    for index, box in enumerate(boxes):
        assert box.outside(frame) == 0
        assert sum(map(box.overlap, [*boxes[:index], *marks])) < 1


def test_importing_the_report_brings_no_heavy_package() -> None:
    code = "import sys, wan_sweep.report, wan_sweep.track; print({'torch', 'mlflow', 'matplotlib'} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert found.stdout.strip() == "set()"


def test_one_job_and_twelve_draw_without_a_warning(tmp_path: Path) -> None:
    metrics = metrics_of(base={"t5": 3.0, "dit": 2.0, "vae": 4.0}, activation=41)
    for count in (1, 12):
        folder = write_sweep(
            tmp_path / str(count), *(record(n, {"base_seed": n}, metrics) for n in range(1, count + 1))
        )
        write_reports(folder)
        assert (folder / "memory_time.png").exists()


def test_the_barest_measurements_make_a_report(tmp_path: Path) -> None:
    bare = {"memory/peak/allocated_bytes": 64 * 2**20, "time/total_s": 0.1}
    write_sweep(tmp_path, record(1, {"base_seed": 1}, bare), record(2, {"base_seed": 2}, {"time/total_s": 1.0}))
    write_reports(tmp_path)
    assert "Least memory: job 1 (base\\_seed=1), peak 64.0 MiB allocated." in (tmp_path / "report.md").read_text(
        "utf-8"
    )


def test_a_commit_whose_files_were_changed_is_named_so(tmp_path: Path) -> None:
    one = record(1, {}, metrics_of(base={"dit": 2740}, activation=640))
    one["environment"] = {**one["environment"], "git_dirty": "true"}
    folder = write_sweep(tmp_path, one)
    write_reports(folder)
    assert "commit 1f0c2d3 with changes" in (folder / "report.md").read_text("utf-8")
