"""The kernel that joins parts of a ring, compiled for Hopper; it needs Triton, and no GPU."""

import re

import pytest

HEAD_WIDTH = 128


@pytest.mark.parametrize("result", ["bf16", "fp32"])
def test_rows_are_read_and_written_sixteen_bytes_at_a_time(result: str) -> None:
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from wan21.kernels.gpu.ring import HEADS_PER_PROGRAM, _join

    constants = {"head_width": HEAD_WIDTH, "width": HEAD_WIDTH, "rows": HEADS_PER_PROGRAM}
    types = {"result": f"*{result}", "out": "*bf16", "more": "*bf16"}
    types |= {**dict.fromkeys(("joint_lse", "lse", "more_lse"), "*fp32"), **dict.fromkeys(constants, "constexpr")}
    # As a launch finds them: tensors and strides, all multiples of 16, but for numbers that it is told not to look at.
    multiples = [one for one in _join.params if one.name not in constants and not one.do_not_specialize]
    source = ASTSource(
        _join,
        {one.name: types.get(one.name, "i32") for one in _join.params},
        {(one.num,): constants[one.name] for one in _join.params if one.name in constants},
        {(one.num,): [["tt.divisibility", 16]] for one in multiples},
    )
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    assert not re.findall(r"(?:ld|st)\.global\S*\.b16", ptx)
    assert "ld.global.v4.b32" in ptx
    assert "st.global.v4.b32" in ptx
