"""Kernels between products, in eight bits too, and of a ring, compiled for Hopper: rows pass in vectors."""

import re
from typing import Any

import pytest

triton = pytest.importorskip("triton")

FLOATS = dict.fromkeys(
    ("joint_lse", "lse", "more_lse", "x", "scale", "shift", "gate", "weight", "turns", "factor", "summand"), "*fp32"
)
HALVES = dict.fromkeys(("out", "more", "result", "branch"), "*bf16")
RMS = {"width": 1536, "member_width": 384, "part": 512, "is_turned": True, "is_far": False}


def ptx_of(kernel: Any, constants: dict[str, Any], types: dict[str, str], num_warps: int) -> str:
    """As a launch finds it: tensors and strides are multiples of 16, unless it is told not to look at them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {**FLOATS, **HALVES, "eps": "fp32", **types, **dict.fromkeys(constants, "constexpr")}
    signature = {one.name: types.get(one.name, "i32") for one in kernel.params}
    multiples = [
        one for one in kernel.params if not one.do_not_specialize and signature[one.name] not in {"constexpr", "fp32"}
    ]
    source = ASTSource(
        kernel,
        signature,
        {(one.num,): constants[one.name] for one in kernel.params if one.name in constants},
        {(one.num,): [["tt.divisibility", 16]] for one in multiples},
    )
    found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    return str(found.asm["ptx"])


@pytest.mark.parametrize(
    ("name", "constants", "types", "num_warps"),
    [
        ("ring._join", {"head_width": 128, "width": 128, "rows": 16}, {}, 4),
        ("ring._join", {"head_width": 128, "width": 128, "rows": 16}, {"result": "*fp32"}, 4),
        ("tokens._rms_heads", RMS, {"x": "*bf16"}, 1),
        ("tokens._rms_heads", {**RMS, "is_turned": False}, {"x": "*bf16"}, 1),
        ("tokens._modulate", {"width": 1536, "part": 512, "rounds": True}, {}, 4),
        ("fp8._affine", {"block": 1024, "rows": 8}, {"x": "*bf16", "out": "*fp8e4nv"}, 4),
        ("tokens._add_gated", {"block": 2048, "rows": 2, "is_gated": True}, {}, 4),
    ],
)
def test_rows_are_read_and_written_in_vectors(
    name: str, constants: dict[str, Any], types: dict[str, str], num_warps: int
) -> None:
    from wan21.kernels.gpu import fp8, ring, tokens

    module, _, function = name.partition(".")
    ptx = ptx_of(getattr({"fp8": fp8, "ring": ring, "tokens": tokens}[module], function), constants, types, num_warps)
    narrow = re.findall(r"(?:ld|st)\.global\S*(?<!v4)(?<!v2)\.b(?:16|32)\b", ptx)
    # Of a join the denominators of its rows, one number each: three loads and stores in each layout that needs them.
    assert len(narrow) <= (7 if function == "_join" else 0)
    assert ".b16" not in "".join(re.findall(r"(?:ld|st)\.global\S*", ptx))
    assert "ld.global.v4.b32" in ptx
