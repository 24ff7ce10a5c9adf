"""From a job and a card to an estimate, and the process that makes it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from wan21.errors import UsageError
from wan_sweep.cards import CARDS, card_named
from wan_sweep.estimate.predict import estimate
from wan_sweep.schema import Job
from wan_sweep.units import GIB, MIB

TINY = Job(model="tiny", device="cuda")
PHASES = ("load", "encode_text", "denoise", "decode", "save")
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def on_h100() -> dict[str, Any]:
    return estimate(TINY, card_named("H100-80GB"))


def test_an_estimate_has_the_metrics_of_a_measured_run_and_no_time_but_bounds(on_h100: dict[str, Any]) -> None:
    metrics = on_h100["metrics"]
    assert on_h100["outcome"] == "ok"
    for phase in PHASES:
        for counter in ("requested", "allocated", "reserved"):
            assert metrics[f"memory/peak/{phase}/{counter}_bytes"] > 0
    times = {name for name in metrics if name.startswith("time/") or "host_rss" in name}
    assert times == {f"time/lower_bound/{name}_s" for name in (*PHASES, "step", "total")}
    assert list(on_h100["series"]) == ["step/allocated_bytes", "step/reserved_bytes"]
    assert metrics["memory/base/libraries_bytes"] == 33 * MIB
    assert json.loads(json.dumps(on_h100)) == on_h100


def test_the_bytes_of_each_peak_add_up_by_where_they_come_from(on_h100: dict[str, Any]) -> None:
    assert tuple(on_h100["estimate"]["confidence"]) == PHASES
    for phase, confidence in on_h100["estimate"]["confidence"].items():
        peak = on_h100["metrics"][f"memory/peak/{phase}/allocated_bytes"]
        assert confidence["allocated_bytes"] == peak
        assert sum(confidence["by_basis_bytes"].values()) == peak
        assert confidence["by_basis_bytes"]["guess"] == 0
        assert confidence["at_most_bytes"] == peak


def test_the_live_set_at_the_peak_names_its_weights(on_h100: dict[str, Any]) -> None:
    whole, *phases = on_h100["peaks"]
    assert whole["scope"] == "run"
    assert [peak["phase"] for peak in phases] == list(PHASES)
    metrics = on_h100["metrics"]
    assert whole["allocated_bytes"] == metrics["memory/peak/allocated_bytes"]
    assert whole["weights"] == {name: metrics[f"memory/base/{name}_bytes"] for name in ("t5", "dit", "vae")}
    assert sum(line["bytes"] for line in whole["live"]) + whole["rest_bytes"] == whole["allocated_bytes"]
    workspace = next(line for line in whole["live"] if line["kind"] == "workspace")
    assert workspace["operation"] == "aten.mm.default (cuBLAS workspace)"


def test_a_card_that_was_not_measured_gets_guesses_an_interval_and_a_warning(on_h100: dict[str, Any]) -> None:
    result = estimate(TINY, card_named("RTX4060-8GB"))
    assert [warning["code"] for warning in result["warnings"]] == ["kernels_not_measured"]
    assert result["estimate"]["confidence"]["denoise"]["by_basis_bytes"]["guess"] > 0
    decode = result["estimate"]["confidence"]["decode"]
    assert decode["at_most_bytes"] > decode["allocated_bytes"]
    # Nothing but the workspace of cuBLAS and the kernel of attention is different.
    weights = [name for name in result["metrics"] if name.startswith("memory/base/") and "libraries" not in name]
    assert {name: result["metrics"][name] for name in weights} == {name: on_h100["metrics"][name] for name in weights}


def test_a_job_that_does_not_fit_says_where_and_a_checkpoint_is_not_opened() -> None:
    result = estimate(TINY.replace(memory_limit_gib=0.05, ckpt_dir="weights"), card_named("H100-80GB"))
    assert result["outcome"] == "oom"
    assert [warning["code"] for warning in result["warnings"]] == ["checkpoint_not_read"]
    assert result["reason"].startswith(
        "does not fit into 51.2 MiB of the H100-80GB: out of memory in load, t5: 4.0 MiB more were asked for"
    )
    assert result["failure"]["phase"] == "load"
    assert result["failure"]["request_bytes"] == 4 * MIB
    # The numbers say what it would need.
    assert result["metrics"]["memory/num_ooms"] == 0
    assert result["metrics"]["memory/peak/reserved_bytes"] > 0.05 * GIB
    assert result["metrics"]["memory/peak/decode/allocated_bytes"] > 0


def test_an_unknown_card_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UsageError, match=r"card=TITAN is not known; choose .*RTX4090-24GB"):
        card_named("TITAN")
    assert all(card.name == name for name, card in CARDS.items())


def test_a_process_of_its_own_leaves_the_same_numbers_in_the_folder(on_h100: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(json.dumps({"knobs": TINY.to_dict()}))
    path = os.pathsep.join((str(REPOSITORY), str(REPOSITORY / "Wan2.1")))
    command = [sys.executable, "-m", "wan_sweep.estimate.run", str(tmp_path), "H100-80GB"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "estimate.json").read_text())
    assert result["metrics"] == on_h100["metrics"]
