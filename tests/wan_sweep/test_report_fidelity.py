from pathlib import Path

import pytest

from tests.wan_sweep.made_up_events import write_main_sweep
from tests.wan_sweep.made_up_records import KNOBS, metrics_of, record, write_sweep
from wan_sweep.report.cells import columns_of
from wan_sweep.report.fidelity import fidelity, fidelity_cell
from wan_sweep.report.sheet import Row, Sheet, read_sheet

BASE = {"t5": 3.0, "dit": 2.0, "vae": 4.0}
APART = {"fidelity/is_bit_equal": 0, "fidelity/ssim": 0.98, "fidelity/max_abs_diff": 9}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Sheet:
    return read_sheet(write_main_sweep(tmp_path_factory.mktemp("whole")))


def row_of(folder: Path, *measured: dict[str, float]) -> Row:
    """One configuration whose repeats have these measures of fidelity."""
    jobs = [
        record(n + 1, {}, metrics_of(base=BASE, activation=41) | numbers, repeat=n, knobs={**KNOBS, "repeats": 2})
        for n, numbers in enumerate(measured)
    ]
    (row,) = read_sheet(write_sweep(folder, *jobs)).rows
    return row


def test_the_table_says_equal_or_how_far(whole: Sheet) -> None:
    cells = {column.title: column.cells for column in columns_of(whole)}
    assert cells["fidelity", "dB"] == ("reference", "equal", "41.3", "41.3", "-", "-")


def test_the_full_table_has_all_distances(whole: Sheet) -> None:
    cells = {column.title: column.cells for column in columns_of(whole, is_full=True)}
    assert cells["SSIM",] == ("-", "1.0000", "0.9871", "0.9871", "-", "-")
    assert cells["max diff", "levels"] == ("-", "0", "23", "23", "-", "-")
    assert cells["latents", "max diff"] == ("-", "-", "0.071", "0.071", "-", "-")


def test_without_a_comparison_there_is_no_column(tmp_path: Path) -> None:
    sheet = read_sheet(write_sweep(tmp_path, record(1, {}, metrics_of(base=BASE, activation=41))))
    assert all(column.title[0] != "fidelity" for column in columns_of(sheet, is_full=True))
    assert fidelity(sheet) == []


def test_the_sentences_put_equal_distances_together(whole: Sheet) -> None:
    assert fidelity(whole) == [
        "Compared with job 1: job 2 (fp16 offload=false): equal to the bit.",
        (
            "Compared with job 1: jobs 3 and 4: PSNR 41.3 dB, SSIM 0.9871, at most 23 of 255 levels apart, latents at "
            "most 0.071 apart."
        ),
    ]


def test_what_was_not_compared_tells_why(tmp_path: Path) -> None:
    told = {"reference": "", "reference_folder": "", "reason": "another size than the reference."}
    sheet = read_sheet(write_sweep(tmp_path, record(1, {}, metrics_of(base=BASE, activation=41), fidelity=told)))
    assert fidelity(sheet) == ["Not compared: job 1 (t2v-1.3B): another size than the reference."]
    assert fidelity_cell(sheet.rows[0]) is None


def test_of_repeats_the_worst_counts(tmp_path: Path) -> None:
    near, far = APART | {"fidelity/psnr_db": 44.0}, APART | {"fidelity/psnr_db": 38.0}
    assert fidelity_cell(row_of(tmp_path / "both", near, far)) == "38.0"
    assert fidelity_cell(row_of(tmp_path / "equal once", {"fidelity/is_bit_equal": 1}, far)) == "38.0"


def test_equal_pixels_from_other_latents_are_not_called_equal(tmp_path: Path) -> None:
    same_pixels = {"fidelity/is_bit_equal": 0, "fidelity/max_abs_diff": 0, "fidelity/ssim": 1.0}
    assert fidelity_cell(row_of(tmp_path, same_pixels)) == "same video"


def test_runs_of_one_configuration_are_told_to_be_equal_to_the_bit_or_not(tmp_path: Path) -> None:
    one, other = ({"latents_sha256": "aa", "frames_sha256": frames} for frames in ("bb", "cc"))
    outputs = {1: (one, one), 2: (one, other), 3: (one, None)}
    jobs = [
        record(
            3 * repeat + number, {"offload": number}, metrics_of(base=BASE, activation=41), repeat=repeat, outputs=told
        )
        for number, each in outputs.items()
        for repeat, told in enumerate(each)
    ]
    assert fidelity(read_sheet(write_sweep(tmp_path, *jobs))) == [
        "All runs of a configuration are equal to the bit: job 1 (offload=1).",
        "Runs of a configuration differ: job 2 (offload=2).",
    ]
