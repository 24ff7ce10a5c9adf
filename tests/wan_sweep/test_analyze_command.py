import gzip
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.wan_sweep.made_up_traces import gpu_events, write_trace
from wan_sweep.analyze import command
from wan_sweep.analyze.command import main

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "analyze_trace_file.py"
FOLDERS = [str(SCRIPT.parents[1]), str(SCRIPT.parents[1] / "Wan2.1")]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(FOLDERS)}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return write_trace(tmp_path / "trace.json.gz", gpu_events())


def test_the_kind_of_a_file_is_found_from_its_content_and_not_from_its_name(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = trace.rename(trace.with_name("notes.txt"))
    assert main([str(odd)]) == 0
    shown = capsys.readouterr().out
    assert "Peak memory of cuda:0: 8.8 KiB allocated, 11.7 KiB reserved, at 515.0 us, in denoise, step 1" in shown
    assert "GPU 0 was busy 34.8 % of the 890.0 us" in shown


@pytest.mark.parametrize("width", ["60", "80", "120", "200"])
def test_no_line_is_wider_than_the_terminal(
    trace: Path, width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("FORCE_COLOR", "1")  # makes it a terminal
    monkeypatch.setenv("TERM", "xterm")
    assert main([str(trace)]) == 0
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    lines = shown.splitlines()[1:]  # the first one names the file
    assert max(map(len, lines)) <= int(width)
    assert any("aten::mm" in line for line in lines)


def test_json_is_printed_alone_or_written_beside_the_tables(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(trace), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["kind"], printed["schema_version"]) == ("chrome_trace", 1)
    file = trace.with_name("numbers.json")
    assert main([str(trace), "--json", str(file)]) == 0
    assert json.loads(file.read_text()) == printed
    assert "Kernels" in capsys.readouterr().out


def test_top_cuts_tables_and_says_how_many_rows_are_left_out(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(trace), "--top", "1", "--json"]) == 0
    kernels = json.loads(capsys.readouterr().out)["sections"]["kernels"]["tables"]["kernels"]
    assert (len(kernels["rows"]), kernels["num_rows"]) == (1, 2)
    assert main([str(trace), "--top", "1"]) == 0
    assert "and 1 more (--top)" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main([str(trace), "--top", "0"])
    assert stopped.value.code == 2


def test_a_picture_is_drawn_whole_or_not_at_all(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = trace.with_name("picture.png")
    assert main([str(trace), "--png", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main([str(trace), "--png", str(trace.with_name("no") / "folder.png")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert sorted(path.name for path in trace.parent.iterdir()) == ["picture.png", "trace.json.gz"]


WHOLE = gzip.compress(json.dumps({"traceEvents": gpu_events()}).encode())
FLIPPED = WHOLE[:200] + bytes([WHOLE[200] ^ 0xFF]) + WHOLE[201:]
BROKEN = {
    "missing": (None, "cannot be read: No such file"),
    "empty": (b"", "is empty"),
    "truncated gzip": (WHOLE[: len(WHOLE) // 2], "is cut off: its gzip data ends too early"),
    "damaged gzip": (FLIPPED, "is damaged: it is not valid gzip"),
    "empty gzip": (gzip.compress(b""), "is empty"),
    "gzip that is none": (b"\x1f\x9d\x90 compress", "neither JSON nor a pickle"),
    "a zip archive": (b"PK\x03\x04\x14\x00", "is a zip archive, such as torch.save writes"),
    "text": (b"step 1 of 50", "begins with b'step 1 of 50', which is neither JSON nor a pickle"),
    "a page": (b"<html>", "is HTML or XML"),
    "truncated JSON": (gzip.decompress(WHOLE)[:500], "is cut off"),
    "damaged JSON": (b'{"traceEvents": [{"ph": "X" "ts": 1}, {}, {}, {}]}', "its JSON is wrong at character 28"),
    "JSON that is no trace": (b'{"answer": 42}', "is JSON, but no trace: its keys are answer"),
    "an array of numbers": (b"[1, 2, 3]", "none of them is an event of a trace"),
    "an empty array": (b"[]", "none of them is an event"),
    "JSON lines": (b'{"a": 1}\n{"a": 2}\n', "a second value follows"),
    "a record": (b'{"job": {}, "metrics": {}}', "is the record of a job"),
    "another version": (b'{"schema_version": 7, "peaks": []}', "schema_version=7"),
    "truncated pickle": (pickle.dumps({"segments": [1, 2]})[:-4], "is cut off or damaged"),
    "a pickle of something else": (pickle.dumps({"epoch": 3}), "holds no memory snapshot"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_cannot_be_analyzed_gives_one_clear_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, words = BROKEN[kind]
    path = tmp_path / "file.json.gz"
    if content is not None:
        path.write_bytes(content)
    assert main([str(path)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {path}")
    assert words in shown.err
    assert shown.err.count("\n") == 1


def test_a_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "is a folder; name the file in it" in capsys.readouterr().err


class Code:
    """Makes a file when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> object:
        return os.system, (f"touch {self.victim}",)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_pickle_is_refused_and_not_executed(
    protocol: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victim, path = tmp_path / "victim", tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps({"segments": [], "device_traces": [[Code(victim)]]}, protocol=protocol))
    assert main([str(path)]) == 2
    assert "is refused: it is a pickle that wants" in capsys.readouterr().err
    assert not victim.exists()
    pickle.loads(path.read_bytes())  # noqa: S301 # shows that the file would have done it
    assert victim.exists()


PROGRAMS = (b"\x80\x04cbuiltins\neval\n.", b"\x80\x04\x8c\x02os\x8c\x06system\x93.", b"\x80\x02\x82\x01.")


@pytest.mark.parametrize("program", PROGRAMS, ids=["by line", "by stack", "by extension"])
def test_a_pickle_that_names_anything_is_refused(
    program: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(program)
    assert main([str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {path} is ")


def test_an_interrupt_ends_without_a_traceback(
    trace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "analyze", interrupted)
    assert main([str(trace)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_script_runs_from_any_folder_without_torch_and_stands_a_closed_pipe(trace: Path) -> None:
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally: assert not {'torch', 'hydra', 'mlflow'} & set(sys.modules)"
    )
    call = [sys.executable, "-c", program, str(SCRIPT), trace.name]
    done = subprocess.run(call, cwd=trace.parent, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Peak memory of cuda:0" in done.stdout
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        call, cwd=trace.parent, env=ENVIRONMENT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_ctrl_c_while_reading_ends_the_script_quietly(tmp_path: Path) -> None:
    pipe = tmp_path / "endless"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), str(pipe)],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 - as in a terminal
    )
    try:
        with pipe.open("w") as file:  # opens once the script reads
            file.write('{"traceEvents": [')
            file.flush()
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            _, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, error) == (130, "interrupted\n")
