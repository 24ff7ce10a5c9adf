"""Code inside a .pth is found by name and never run."""

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from wan21.errors import CheckpointError
from wan21.weights.checkpoint import PthSource
from wan21.weights.pth import read_pth


class Runs:
    """Pickles to a call of os.system."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def with_pickle(
    path: Path, program: bytes, *, compression: int = zipfile.ZIP_STORED, name: str = "archive/data.pkl"
) -> Path:
    """A .pth whose pickle is replaced."""
    torch.save({"a": torch.zeros(3)}, path)
    with zipfile.ZipFile(path) as old:
        records = [(record.filename, old.read(record)) for record in old.infolist()]
    with zipfile.ZipFile(path, "w", compression) as new:
        for filename, content in records:
            _, _, rest = filename.partition("/")
            new.writestr(name if rest == "data.pkl" else f"archive/{rest}", program if rest == "data.pkl" else content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_pth(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch says so before it refuses
@pytest.mark.parametrize(("protocol", "opcode"), [(2, b"c"), (4, b"\x93")])
def test_code_is_refused_by_name_and_not_run(tmp_path: Path, protocol: int, opcode: bytes) -> None:
    marker = tmp_path / "ran"
    program = pickle.dumps({"a": 1, "b": Runs(f"touch {marker}")}, protocol)
    assert opcode in program
    path = with_pickle(tmp_path / "evil.pth", program)
    assert "posix.system" in refusal(path)
    with pytest.raises(CheckpointError, match=r"evil\.pth cannot be read"):
        PthSource(path)
    assert not marker.exists()
    pickle.loads(program)  # noqa: S301 # shows that the pickle would have run its command
    assert marker.exists()


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


MEMOIZE, POP, DUP, STACK_GLOBAL, STOP, CALL = b"\x94", b"0", b"2", b"\x93", b".", b")R"
PROTOCOL = b"\x80\x04"


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        # Names pushed, remembered, dropped, and fetched from the memo.
        (
            short("posix") + MEMOIZE + short("system") + MEMOIZE + POP + POP + b"h\x00h\x01" + STACK_GLOBAL,
            "posix.system",
        ),
        # The memo written by number, with a harmless name on top of the stack in between.
        (
            short("os") + b"q\x05" + short("torch") + POP + POP + b"h\x05" + short("popen") + STACK_GLOBAL,
            "os.popen",
        ),
        # A memo slot that is written twice.
        (
            short("torch") + b"q\x00" + short("os") + b"q\x00" + POP + POP + b"h\x00" + short("Size") + STACK_GLOBAL,
            "os.Size",
        ),
        # Harmless names on the stack, then shuffled.
        (
            short("system") + short("posix") + short("torch") + short("Size") + POP + POP + STACK_GLOBAL,
            "a name that it computes",
        ),
        (short("system") + DUP + STACK_GLOBAL, "a name that it computes"),
        (STACK_GLOBAL, "a name that it computes"),
        (b"cposix\nsystem\n", "posix.system"),
        (b"(S'ls'\niposix\nsystem\n", "posix.system"),
        (b"cbuiltins\ngetattr\n", "builtins.getattr"),
        (b"\x82\x01", "copyreg extension 1"),
    ],
)
def test_every_way_to_a_name_is_followed(tmp_path: Path, program: bytes, expected: str) -> None:
    assert expected in refusal(with_pickle(tmp_path / "evil.pth", PROTOCOL + program + CALL + STOP))


@pytest.mark.parametrize("program", [b"", b"\x80\x04\x8c\xffab", b"\x00\x01\x02", b"\x80\x04N"])
def test_a_pickle_that_is_none_is_refused(tmp_path: Path, program: bytes) -> None:
    assert "cannot be read" in refusal(with_pickle(tmp_path / "odd.pth", program))


def test_names_are_reported_together(tmp_path: Path) -> None:
    program = PROTOCOL + b"cos\nsystem\ncbuiltins\neval\n" + STOP
    assert "builtins.eval, os.system" in refusal(with_pickle(tmp_path / "evil.pth", program))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_torch_saves_is_let_through(tmp_path: Path, dtype: torch.dtype) -> None:
    module = torch.nn.Linear(3, 2, dtype=dtype)
    content = {"weight": module.weight, "plain": module.bias.detach(), "view": torch.ones(4, dtype=dtype)[1:3]}
    torch.save(content, tmp_path / "a.pth")
    torch.save(module.state_dict(), tmp_path / "b.pth")
    facts = read_pth(tmp_path / "a.pth")
    assert len(facts.dtypes) == 1
    assert facts.num_bytes == (6 + 2 + 4) * dtype.itemsize
    assert read_pth(tmp_path / "b.pth").dtypes == facts.dtypes


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_protocol_that_torch_does_not_load_safely_is_refused(tmp_path: Path, protocol: int) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "new.pth", pickle_protocol=protocol)
    assert f"pickle protocol {protocol}" in refusal(tmp_path / "new.pth")


def test_a_pth_of_the_old_kind_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert "is not a zip" in refusal(tmp_path / "old.pth")


def test_a_zip_behind_other_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "two.pth"
    torch.save({"a": torch.zeros(2)}, path)
    path.write_bytes(b"\x80\x02cposix\nsystem\n" + path.read_bytes())
    assert "is not a zip" in refusal(path)


def test_a_compressed_pth_is_refused_because_it_cannot_be_mapped(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "packed.pth", PROTOCOL + b"}" + STOP, compression=zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(path)


def test_a_zip_without_a_pickle_is_refused(tmp_path: Path) -> None:
    path = with_pickle(tmp_path / "none.pth", PROTOCOL + b"}" + STOP, name="archive/other")
    assert "0 records named data.pkl" in refusal(path)


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"a": 1}, {"state_dict": {"a": torch.zeros(2)}}])
def test_a_pth_that_is_no_dict_of_tensors_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "list.pth")
    read_pth(tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match=r"list\.pth is no plain dict"):
        PthSource(tmp_path / "list.pth")
