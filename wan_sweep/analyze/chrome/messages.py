"""How many bytes a rank gives to others in a collective, as the details of its event tell."""

import math
from collections.abc import Mapping
from typing import Any

GLOO = "gloo:"

_NUM_BYTES = {
    "bfloat16": 2,
    "bool": 1,
    "byte": 1,
    "char": 1,
    "double": 8,
    "float": 4,
    "half": 2,
    "int": 4,
    "long": 8,
    "short": 2,
    "long int": 8,
    "signed char": 1,
    "unsigned char": 1,
}
_RECEIVES = frozenset({"gloo:recv", "gloo:recvAnysource"})


def given_bytes(name: str, details: Mapping[str, Any]) -> int | None:
    """The bytes; None where the event does not say.

    Args:
        name: of the event: a kernel of NCCL, or a range of gloo.
        details: its `args`.
    """
    if "In msg nelems" in details:
        size = _NUM_BYTES.get(str(details.get("dtype", "")).lower())
        return None if size is None else int(details["In msg nelems"]) * size
    if not name.startswith(GLOO):
        return None
    if name in _RECEIVES:
        return 0
    shapes, types = details.get("Input Dims") or [], details.get("Input type") or []
    sizes = [_NUM_BYTES.get(str(kind).removeprefix("c10::").lower()) for kind in types]
    if not shapes or len(shapes) != len(sizes) or None in sizes:
        return None
    return sum(int(math.prod(shape)) * (size or 0) for shape, size in zip(shapes, sizes, strict=True))
