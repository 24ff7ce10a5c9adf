"""scripts/run_estimate_check.py and scripts/compare_estimates.py: what is run, in which order, and what stays of it."""

import importlib
import json
import sys
import tarfile
import threading
import time
from hashlib import sha256
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.initialize import initialize_config_dir
from hydra.types import RunMode

from tests.conftest import wait_for
from tests.wan_sweep.made_up_records import ENVIRONMENT, GIB, KNOBS, metrics_of, record
from wan_sweep.convert import candidates_of
from wan_sweep.errors import UsageError
from wan_sweep.record import RECORD_FILE, Record

# Plays `python -m wan_sweep`: leaves a record, or none; waits where it is asked to; notes the GPU and the settings.
FAKE = """
import json, os, sys, time
from pathlib import Path
told = dict(word.partition("=")[::2] for word in sys.argv[3:])
root = Path(told["output_root"])
with (root / "calls").open("a") as calls:
    calls.write(f'{told["name"]} {os.environ["CUDA_VISIBLE_DEVICES"]} {os.environ.get("PYTORCH_CUDA_ALLOC_CONF")}\\n')
if "waits" in told["name"]:
    time.sleep(600)
if "breaks" in told["name"]:
    sys.exit("something broke")
folder = root / told["name"] / "now" / "1_job"
folder.mkdir(parents=True, exist_ok=True)
record = json.loads((root / "made_up.json").read_text())
record["knobs"] |= {"name": told["name"]} | ({"frame_num": 5} if "random" in told["name"] else {})
(folder / "record.json").write_text(json.dumps(record))
"""

ALLOCATOR = ENVIRONMENT["allocator"]


@pytest.fixture
def check(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(repository / "scripts"))
    return importlib.import_module("run_estimate_check")


@pytest.fixture
def compare(check: ModuleType) -> ModuleType:
    assert check is not None  # which lets scripts be imported
    return importlib.import_module("compare_estimates")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    metrics = metrics_of(base={"t5": 10835.0, "dit": 2706.0, "vae": 242.0}, activation=3000)
    (tmp_path / "made_up.json").write_text(json.dumps(record(1, {"offload": True}, metrics, knobs=KNOBS)))
    (tmp_path / "fake.py").write_text(FAKE)
    return tmp_path


def run(check: ModuleType, root: Path, names: list[str], *, lanes: list[str]) -> tuple[int, list[str]]:
    """How many jobs are missing, and the calls."""
    asked = [check.Asked(name=name, knobs=(), allocator="some" if name == "set" else "") for name in names]
    python = (sys.executable, str(root / "fake.py"))
    one = check.Check(output=root, pack=root / "pack.tar.gz", seconds=600, python=python)
    missing = one.run(asked, lanes)
    calls = (root / "calls").read_text().splitlines() if (root / "calls").exists() else []
    return missing, calls


def test_there_are_more_than_forty_with_ten_that_only_a_seed_decides(check: ModuleType) -> None:
    one, same, other = check.jobs("a"), check.jobs("a"), check.jobs("b")
    assert one == same
    assert len({(job.knobs, job.allocator) for job in one}) >= 40
    differ = [first.name for first, second in zip(one, other, strict=True) if first != second]
    assert len(differ) >= 10
    assert all(name.startswith("random") for name in differ)
    assert "size=1280*720" in one[0].knobs


def test_a_seed_draws_what_it_has_always_drawn(check: ModuleType) -> None:
    """Written down when five of these had been measured on an H200 (2026-12-01): none may become another."""
    drawn = [job for job in check.jobs("491698de0593bf62e3e9b1e3a9467889edddeee5") if job.name.startswith("random")]
    words = "\n".join(" ".join((job.name, *job.knobs)) for job in sorted(drawn, key=lambda job: job.name))
    assert sha256(words.encode()).hexdigest().startswith("2d0406fc28bab3e6")


def test_random_jobs_come_behind_the_first_five_and_slow_ones_last_in_their_group(check: ModuleType) -> None:
    asked = check.jobs("a")
    names = [job.name for job in asked]
    assert names[:5] == [f"first{number:02d}" for number in range(1, 6)]
    assert all(name.startswith("random") for name in names[5:17])
    for group in (asked[5:17], asked[17:25]):
        slow = ["t5_cpu=true" in job.knobs for job in group]
        assert slow == sorted(slow)
        assert set(slow) == {False, True}


def test_every_kind_of_job_is_a_command_that_the_program_takes(check: ModuleType, repository: Path) -> None:
    with initialize_config_dir(str(repository / "conf"), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        for asked in check.jobs("a")[::10]:
            words = [word for word in asked.command(Path("out"))[2:] if not word.startswith("hydra")]
            config = loader.load_configuration("config", words, run_mode=RunMode.RUN)
            (candidate,) = candidates_of(config, loader)
            assert candidate.job.sample_steps == 2
            assert candidate.job.mode == "measure"
            assert candidate.job.name == asked.name


def test_jobs_have_the_gpu_of_their_lane_and_their_own_settings(check: ModuleType, root: Path) -> None:
    missing, calls = run(check, root, ["set", "plain"], lanes=["7"])
    assert missing == 0
    assert calls == ["set 7 some", "plain 7 None"]


def test_what_has_a_good_record_does_not_run_again(check: ModuleType, root: Path) -> None:
    run(check, root, ["one", "breaks"], lanes=["0"])
    missing, calls = run(check, root, ["one", "breaks", "two"], lanes=["0"])
    assert missing == 1
    assert calls == ["one 0 None", "breaks 0 None", "breaks 0 None", "two 0 None"]


def test_another_machine_goes_on_from_an_archive_and_its_own_holds_all(
    check: ModuleType, root: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run(check, root, ["one", "breaks"], lanes=["0"])
    other = tmp_path_factory.mktemp("other")
    for name in ("made_up.json", "fake.py"):
        (other / name).write_text((root / name).read_text())
    knobs = ("frame_num=81", "optimization=none")
    asked = [check.Asked(name=name, knobs=knobs, allocator=ALLOCATOR) for name in ("one", "breaks", "two")]
    (taken,) = check.take_over(asked, root / "pack.tar.gz", other)
    assert taken.knobs["name"] == "one"
    missing, calls = run(check, other, ["one", "breaks", "two"], lanes=["0"])
    assert missing == 1
    assert calls == ["breaks 0 None", "two 0 None"]
    with tarfile.open(other / "pack.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["breaks/log.txt", f"one/{RECORD_FILE}", f"two/{RECORD_FILE}"]


@pytest.mark.parametrize("changed", [{"knobs": ("frame_num=33",)}, {"allocator": ""}])
def test_an_archive_of_another_seed_is_refused(check: ModuleType, root: Path, changed: dict[str, Any]) -> None:
    run(check, root, ["one"], lanes=["0"])
    asked = [check.Asked(**{"name": "one", "knobs": ("frame_num=81",), "allocator": ALLOCATOR, **changed})]
    with pytest.raises(UsageError, match=r"its one is not .* give the --seed"):
        check.take_over(asked, root / "pack.tar.gz", root / "new")
    assert not (root / "new").exists()


def test_the_archive_has_every_record_and_the_words_of_what_left_none(check: ModuleType, root: Path) -> None:
    run(check, root, ["one", "breaks"], lanes=["0", "1"])
    with tarfile.open(root / "pack.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["breaks/log.txt", f"one/{RECORD_FILE}"]
        log = archive.extractfile("breaks/log.txt")
        assert log is not None
        assert log.read() == b"something broke"


def test_at_the_end_of_its_time_it_ends_what_is_under_way_and_keeps_the_rest(
    check: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def now() -> float:
        """An hour later for the one who waits for the end, as soon as the second job is under way."""
        if threading.current_thread() is not threading.main_thread():
            return time.monotonic()
        wait_for(lambda: "waits" in ((root / "calls").read_text() if (root / "calls").exists() else ""))
        return time.monotonic() + 3600

    monkeypatch.setattr(check, "time", SimpleNamespace(monotonic=now))
    missing, calls = run(check, root, ["one", "waits", "two"], lanes=["0"])
    assert missing == 2
    assert [call.split()[0] for call in calls] == ["one", "waits"]
    with tarfile.open(root / "pack.tar.gz") as archive:
        assert f"one/{RECORD_FILE}" in archive.getnames()


def test_the_comparison_reads_the_archive_and_names_the_worst(
    check: ModuleType, compare: ModuleType, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(check, root, ["one", "random01", "two"], lanes=["0"])  # the last one is the first again

    def estimated(one: Record, _: Path) -> dict[str, object]:
        metrics = dict(one.metrics) | {"memory/peak/denoise/allocated_bytes": 20 * GIB}
        return {"metrics": metrics, "estimate": {"seconds": 7.5}}

    monkeypatch.setattr(compare, "estimated", estimated)
    lines = compare.tables([root / "pack.tar.gz"], 1).splitlines()
    assert lines[0].startswith("2 configurations, 1 of them drawn at random, from 3 measured jobs of 3 records.")
    (denoise,) = [line for line in lines if line.startswith("| denoise | allocated")]
    (decode,) = [line for line in lines if line.startswith("| decode | allocated")]
    assert "| 0 of 2 |" in denoise
    assert "| 20.00 GiB |" in denoise
    assert "| 2 of 2 | 0.000 | 0 | | | |" in decode
    assert sum(line.endswith("| 7.5 |") for line in lines) == 2
