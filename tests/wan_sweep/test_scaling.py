"""conf/experiment/scaling.yaml, scripts/run_scaling.sh and scripts/scaling_table.py."""

import importlib
import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.initialize import initialize_config_dir
from hydra.types import RunMode

from tests.wan_sweep.made_up_records import GIB, KNOBS, metrics_of, record, write_sweep
from tests.wan_sweep.test_plan_rules import TWO_GPUS
from tests.wan_sweep.test_record_table import rows
from wan_sweep.convert import Candidate, candidates_of
from wan_sweep.errors import RecordError
from wan_sweep.rules import resolve

CONF = Path(__file__).resolve().parents[2] / "conf"
SAME, OTHER = {"latents_sha256": "aa", "frames_sha256": "bb"}, {"latents_sha256": "aa", "frames_sha256": "cc"}

FAKE_PYTHON = """#!/usr/bin/env bash
printf '%s ' "$@" >> "$CALLS"
echo >> "$CALLS"
[[ "$1" == -m ]] || exit 0
for argument in "$@"; do
  if [[ "$argument" == hydra.run.dir=* ]]; then mkdir -p "${argument#hydra.run.dir=}"; fi
done
[[ "$*" != *FAILS* ]] || exit 1
"""


@pytest.fixture
def table(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module("scaling_table")


def candidates(*overrides: str) -> list[Candidate]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        asked = ["+experiment=scaling", *overrides]
        return candidates_of(loader.load_configuration("config", asked, run_mode=RunMode.MULTIRUN), loader)


def test_each_model_runs_on_one_gpu_first_and_what_two_gpus_cannot_do_is_refused_with_the_reason() -> None:
    found = candidates()
    resolved = [resolve(one.job, TWO_GPUS) for one in found]
    assert [one.axes["parallel"] for one in found if one.job.model == "t2v-14B"] == [
        one.axes["parallel"] for one in found if one.job.model == "t2v-1.3B"
    ]
    assert found[0].axes == {"model": "t2v-14B", "parallel": "single"}
    assert {(one.job.size, one.job.frame_num) for one in resolved if not one.refusal} == {
        ("1280*720", 81),
        ("832*480", 81),
    }
    can = [one.axes["parallel"] for one, told in zip(found, resolved, strict=True) if not told.refusal]
    assert can == ["single", "ulysses2", "ring2", "cfg2", "fsdp2"] * 2
    reasons = {(one.job.model, one.axes["parallel"]): told.refusal for one, told in zip(found, resolved, strict=True)}
    assert "needs 4 GPUs, this machine has 2" in reasons["t2v-14B", "hybrid4"]
    assert reasons["t2v-1.3B", "ulysses8"] == (
        "num_heads=12 of t2v-1.3B is not divisible by ulysses_size=8; choose 1, 2, 3, 4, 6 or 12, and ring_size for "
        "the rest"
    )
    assert {(one.job.attention_kernel, one.job.offload, one.job.vae_precision) for one in found} == {
        ("sdpa", False, "bf16")
    }


def job(number: int, split: dict[str, Any], *, step_s: float, peaks: tuple[float, ...], **changes: Any) -> Any:
    """A job of T2V-1.3B in this split; peaks in GiB, of each rank."""
    metrics = metrics_of(base={"dit": 2706.0}, activation=3000, step_s=step_s)
    ranks = [
        {"rank": rank, "metrics": {**metrics, "memory/peak/allocated_bytes": peak * GIB}, "series": {}}
        for rank, peak in enumerate(peaks)
    ]
    metrics |= {"ranks/peak_rank": peaks.index(max(peaks)), **changes.pop("metrics", {})}
    knobs = {**KNOBS, "precision": "bf16", **split, "name": f"sweep{number}"}
    return record(number, {"parallel": str(number)}, metrics, knobs=knobs, ranks=ranks, **changes)


def test_a_row_tells_speed_up_and_every_rank_apart(table: ModuleType, tmp_path: Path) -> None:
    traced = {"collectives/per_step_s": 0.05, "collectives/exposed_per_step_s": 0.01}
    sweep = write_sweep(
        tmp_path / "sweep",
        job(1, {}, step_s=1.0, peaks=(8,)),
        job(2, {"ulysses_size": 2}, step_s=0.5, peaks=(5, 6.5), metrics={"fidelity/latents_relative_l2": 3e-3}),
        job(3, {"cfg_parallel": True, "ring_size": 2, "dit_fsdp": True}, step_s=0.25, peaks=(4,) * 4, metrics=traced),
        job(4, {"ulysses_size": 2, "load_strategy": "part"}, step_s=0.8, peaks=(1, 1)),
        job(5, {"load_strategy": "part", "vae_budget_gib": 0.6, "residual_on_host": 1.0}, step_s=1.6, peaks=(1,)),
    )
    one, two, four, streamed, least = rows(table.page([sweep]), "# The scaling table")
    assert [row["split"] for row in (one, two, four, streamed, least)] == [
        "one GPU",
        "U2",
        "cfg2 x R2 + FSDP of DiT",
        "U2 + streamed",
        "one GPU + streamed + tiles + residual on host",
    ]
    assert [row["ranks"] for row in (one, two, four, streamed)] == ["1", "2", "4", "2"]
    assert [row["speed-up"] for row in (one, two, four, streamed)] == ["1.00", "2.00", "4.00", "1.25"]
    assert [row["forward s"] for row in (one, two)] == ["0.500", "0.250"]
    assert two["peak GiB"] == "6.50 (rank 1; least 5.00)"
    assert two["fullest rank"] == "1"
    assert two["DiT GiB"] == "2.64"
    assert two["latents relative L2"] == "3.00e-03"
    assert four["in collectives"] == "20.0 % (4.0 % alone)"
    assert four["peak GiB"] == "4.00"
    assert (four["process GiB"], four["pinned GiB"]) == ("-", "0.00")


def test_what_was_taken_over_counts_once_and_a_second_run_is_compared_bit_by_bit(
    table: ModuleType, tmp_path: Path
) -> None:
    first = write_sweep(
        tmp_path / "first",
        job(1, {}, step_s=1.0, peaks=(8,), outputs=SAME),
        job(2, {"ulysses_size": 2}, step_s=0.6, peaks=(5, 5), outputs=SAME),
    )
    taken = {"outcome": "skipped", "outputs": SAME}
    second = write_sweep(
        tmp_path / "second",
        job(1, {}, step_s=1.0, peaks=(8,), measured_in=str(first / "1_parallel=1"), **taken),
        job(2, {"ulysses_size": 2}, step_s=0.6, peaks=(5, 5), measured_in=str(first / "2_parallel=2"), **taken),
        job(3, {}, step_s=1.0, peaks=(8,), repeat=1, outputs=SAME),
        job(4, {"ulysses_size": 2}, step_s=0.5, peaks=(5, 5), repeat=1, outputs=OTHER),
    )
    one, two = rows(table.page([first, second]), "# The scaling table")
    assert one["same bits"] == "yes, 2 runs"
    assert two["same bits"] == "no, 2 runs"
    assert two["step s"] == "0.550"
    (alone, _) = rows(table.page([first]), "# The scaling table")
    assert alone["same bits"] == "-"


def test_refusals_and_estimates_stand_in_the_table(table: ModuleType, tmp_path: Path) -> None:
    split = {"ulysses_size": 2}
    sweep = write_sweep(
        tmp_path / "sweep",
        job(1, split, step_s=1.0, peaks=(8, 8)),
        job(2, {"ulysses_size": 5}, step_s=1.0, peaks=(8,))
        | {"outcome": "refused", "reason": "5 of 12", "metrics": {}},
        job(3, {**split, "mode": "estimate", "card": "H200-141GB"}, step_s=1, peaks=(9, 9), mode="estimate")
        | {"metrics": {"memory/peak/allocated_bytes": 9 * GIB}},
    )
    page = table.page([sweep])
    measured, refused = rows(page, "# The scaling table")
    assert measured["estimated peak GiB"] == "9.00"
    assert "| peak GiB | estimated peak GiB | reserved GiB |" in " ".join(page.split())
    assert (refused["outcome"], refused["step s"], refused["estimated peak GiB"]) == ("refused", "-", "-")
    assert ", U5: refused: 5 of 12" in page
    with pytest.raises(RecordError, match="no records"):
        table.page([tmp_path])


def test_all_that_the_table_needs_is_packed_into_one_file(table: ModuleType, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep", job(1, {}, step_s=1.0, peaks=(8,)))
    packed = tmp_path / "packed.tar.gz"
    words = table.page([sweep])
    table.pack(packed, [sweep], words)
    with tarfile.open(packed) as archive:
        archive.extractall(tmp_path / "elsewhere", filter="data")
    assert words == (tmp_path / "elsewhere/table.md").read_text("utf-8")
    assert words == table.page([tmp_path / "elsewhere/sweep"])


def run(folder: Path, repository: Path, *arguments: str, **variables: str) -> tuple[int, list[str]]:
    """The exit code of the script in a made-up checkout, and the calls of Python."""
    for part in ("scripts", ".venv/bin"):
        (folder / "a checkout" / part).mkdir(parents=True)
    shutil.copy(repository / "scripts/python.sh", folder / "a checkout/scripts")
    script = shutil.copy(repository / "scripts/run_scaling.sh", folder / "a checkout/scripts")
    python = folder / "a checkout/.venv/bin/python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in {"PYTHON", "PYTHONPATH"}}
    environment = {**kept, "CALLS": str(folder / "calls"), **variables}
    command = ["bash", str(script), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, check=False, timeout=240)
    return done.returncode, (folder / "calls").read_text().splitlines()


def test_after_each_sweep_comes_the_table_of_all_of_them(tmp_path: Path, repository: Path) -> None:
    code, calls = run(tmp_path, repository, "trace=true", PACK="all.tar.gz")
    assert code == 0
    sweeps, tables = calls[::2], calls[1::2]
    assert [call.split(" ", 4)[4].strip() for call in sweeps] == [
        "model=t2v-14B trace=true",
        "model=t2v-1.3B trace=true",
        "model=t2v-14B load_strategy=full,part parallel=single,ulysses2,ulysses4,ulysses8 trace=true",
        "model=t2v-1.3B repeats=2 trace=true",
        "model=t2v-14B optimization=none,lowest_memory parallel=single,ulysses2,ulysses4,ulysses8 trace=true",
    ]
    assert [call.count("outputs/scaling/") for call in tables] == [2, 3, 4, 5, 6]
    assert all(call.strip().endswith("--pack all.tar.gz") for call in tables)


def test_the_splits_of_the_command_line_hold_for_all_sweeps_and_a_bad_one_stops_none(
    tmp_path: Path, repository: Path
) -> None:
    code, calls = run(tmp_path, repository, "parallel=single,ring2", "description=FAILS", MODELS="tiny", WITHIN="50")
    assert code == 1
    assert len(calls) == 8
    assert all(call.count("parallel=") == 1 for call in calls[::2])
