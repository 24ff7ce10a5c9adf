"""What a .pth file holds, found out without torch and without running anything in it.

A .pth is a zip of raw tensor data and one pickle, and a pickle is a small program that may call any function of any
module. What it could call is known beforehand from the names that it looks up; those are collected here by reading
its instructions one by one. Only what a plain dict of tensors needs is let through.
"""

import pickletools
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan21.errors import CheckpointError

STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
}
DTYPES = ("float64", "float32", "float16", "bfloat16", "double", "float", "half")
PLAIN_GLOBALS = frozenset(
    {
        "collections.OrderedDict",
        "torch._utils._rebuild_tensor_v2",
        "torch._utils._rebuild_parameter",
        "torch.storage.UntypedStorage",
        "torch.Size",
        *(f"torch.{name}" for name in (*STORAGES, *DTYPES)),
    }
)
# Opcodes that leave a known string on the stack, and those that touch neither stack nor memo.
_STRINGS = {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
_NOTHING = {"PROTO", "FRAME"}
SAFE_PROTOCOL = 2
COMPUTED = "a name that it computes"
_AGAIN = "fetch this file again"


@dataclass(frozen=True, kw_only=True)
class PthFacts:
    """A checked .pth file.

    Attributes:
        dtypes: the stored formats, such as ("BF16",).
        num_bytes: bytes of tensor data.
        layout: bytes that tell this file's content from another's: the pickle, and each record's size and checksum.
    """

    path: Path
    dtypes: tuple[str, ...]
    num_bytes: int
    layout: bytes


def read_pth(path: Path) -> PthFacts:
    """The facts of a .pth file that is whole and holds nothing but tensors.

    Raises:
        CheckpointError: the file is cut short, is no zip, is compressed, its pickle looks up other names than a dict
            of tensors needs, or is of a protocol that torch does not load safely.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if not is_zip:
        raise CheckpointError(
            f"{path} is not a zip, as torch.save has written since 1.6; save it again with torch.save"
        )
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            pickles = [record for record in records if record.filename.partition("/")[2].lower() == "data.pkl"]
            if len(pickles) != 1:
                raise CheckpointError(f"{path} holds {len(pickles)} records named data.pkl, not one; {_AGAIN}")
            packed = next((record for record in records if record.compress_type != zipfile.ZIP_STORED), None)
            if packed is not None:
                raise CheckpointError(
                    f"{path} has its record {packed.filename} compressed, so it cannot be mapped; "
                    "save it again with torch.save"
                )
            program = archive.read(pickles[0])
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} is cut short or damaged: it has {size} bytes and no whole table of contents ({error}); {_AGAIN}"
        ) from error
    names = _looked_up(path, program)
    strange = sorted(names - PLAIN_GLOBALS)
    if strange:
        raise CheckpointError(
            f"{path} is refused: its pickle looks up {', '.join(strange)}, which a plain dict of tensors never needs; "
            "nothing of it was run; use a file from a source that you trust"
        )
    if program[:1] == b"\x80" and program[1] != SAFE_PROTOCOL:
        raise CheckpointError(
            f"{path} is written in pickle protocol {program[1]}, and torch's guarded loader reads {SAFE_PROTOCOL}; "
            "save it again with torch.save as it is by default"
        )
    data = [record for record in records if record.filename.partition("/")[2].startswith("data/")]
    table = "\n".join(f"{record.filename.partition('/')[2]} {record.file_size} {record.CRC:08x}" for record in data)
    return PthFacts(
        path=path,
        dtypes=tuple(dtype for name, dtype in STORAGES.items() if f"torch.{name}" in names),
        num_bytes=sum(record.file_size for record in data),
        layout=program + table.encode(),
    )


def _looked_up(path: Path, program: bytes) -> set[str]:
    """Every "module.name" that the pickle would import."""
    names = set()
    strings = _Strings()
    try:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name in {"GLOBAL", "INST"}:
                names.add(str(argument).replace(" ", ".", 1))
            elif opcode.name == "STACK_GLOBAL":
                names.add(strings.joined())
            elif opcode.name.startswith("EXT"):
                names.add(f"copyreg extension {argument}")
            strings.follow(opcode.name, argument)
    except (ValueError, IndexError) as error:
        raise CheckpointError(f"{path} holds a pickle that cannot be read ({error}); {_AGAIN}") from error
    return names


class _Strings:
    """The two topmost entries of the pickle's stack, as far as they are plain strings, and its memo.

    STACK_GLOBAL takes module and name from there. A string that gets there in any way but being pushed, directly or
    from the memo, is not known beforehand and counts as computed.
    """

    def __init__(self) -> None:
        self._top: list[str | None] = []
        self._memo: dict[int, str | None] = {}

    def follow(self, opcode: str, argument: Any) -> None:  # noqa: ANN401 # whatever the opcode carries
        """What the opcode does to the two entries and the memo."""
        if opcode in {"MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT"}:
            slot = len(self._memo) if argument is None else int(argument)
            self._memo[slot] = self._top[-1] if self._top else None
        elif opcode in _STRINGS:
            self._top = [*self._top[-1:], str(argument)]
        elif opcode in {"GET", "BINGET", "LONG_BINGET"}:
            self._top = [*self._top[-1:], self._memo.get(int(argument))]
        elif opcode not in _NOTHING:
            self._top = []

    def joined(self) -> str:
        """The "module.name" that STACK_GLOBAL makes of them now."""
        if len(self._top) < 2 or None in self._top:
            return COMPUTED
        return f"{self._top[0]}.{self._top[1]}"
