"""Operators on the tokens of a transformer, a row each: what lies between its products, each in one pass over memory.

Letters: B videos, R rows, S keys, D model width, N heads, K head width (D = N K).

All of them compute in float32 and round once to the result's number format. They keep no gradients.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from wan21.rope import rotate

_LIBRARY = torch.library.Library("wan21", "DEF")  # the operators live as long as it does


def modulate(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype, norm_dtype: torch.dtype
) -> Tensor:
    """Layer norm without weights, times `scale`, plus `shift`.

    Args:
        x: [B, R, D], float32, rows contiguous.
        scale: [B or 1, 1, D], float32.
        shift: likewise.
        eps: of the norm.
        dtype: of the result.
        norm_dtype: what the norm's output is rounded to before it is scaled.

    Returns:
        [B, R, D], contiguous.
    """
    return torch.ops.wan21.modulate(x, scale, shift, eps, dtype, norm_dtype)


def rms_heads_(x: Tensor, weight: Tensor, turns: Tensor | None, eps: float, out: Tensor) -> None:
    """Root-mean-square norm over the whole width, and rotary positions, written to heads.

    Args:
        x: [B, R, D], contiguous. The norm's output is rounded to its number format, as upstream does.
        weight: [D], float32.
        turns: [R, 1, K/2], complex64, contiguous; None: nothing is turned.
        eps: of the norm.
        out: [B, R, N, K], the last two dimensions contiguous; may be `x` itself, seen so. Or [B, R, G, N / G, K], the
            last two dimensions contiguous: the heads of each of G groups in a place of their own.
    """
    real = None if turns is None else torch.view_as_real(turns)
    torch.ops.wan21.rms_heads_(out if out.dim() == 5 else out.unsqueeze(2), x, weight, real, eps)


def add_gated_(x: Tensor, branch: Tensor, gate: Tensor | None) -> None:
    """Adds a branch, times its gate, to the residual.

    Args:
        x: [B, R, D], float32, rows contiguous.
        branch: [B, R, D], contiguous.
        gate: [B or 1, 1, D], float32; None: one.
    """
    torch.ops.wan21.add_gated_(x, branch, gate)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor | None = None) -> Tensor:
    """A linear layer and the tanh-form GELU of its sums, which on CUDA are not rounded in between.

    Args:
        x: [R, D].
        weight: [M, D].
        bias: [M].
        out: where to write the result, [R, M], if it is to go somewhere.

    Returns:
        [R, M], or `out`.
    """
    if out is None:
        out = x.new_empty(x.shape[0], weight.shape[0])
    torch.ops.wan21.linear_gelu(out, x, weight, bias)
    return out


def attend_counted(q: Tensor, k: Tensor, v: Tensor, repeats: int) -> Tensor:
    """Softmax attention to few keys, the last of which counts as if it stood there `repeats` times.

    exp(s) r = exp(s + log(r)), so that key's scores are raised by the log of its number.

    Args:
        q: [B, R, N, K], contiguous.
        k: [B, S, N, K], contiguous, same dtype.
        v: likewise.
        repeats: 1 or more.

    Returns:
        [B, R, N * K], contiguous.
    """
    return torch.ops.wan21.attend_counted(q, k, v, repeats)


def join_attention(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor, result: Tensor, joint_lse: Tensor) -> None:
    """Attention over two sets of keys together, from attention over each.

    Args:
        out: over the first, [B, R, N, K]; any number format, the last dimension contiguous.
        lse: log of its softmax's denominator, [B, R, N, 1], float32.
        more: over the second, as `out`.
        more_lse: as `lse`.
        result: [B, R, N, K], the last dimension contiguous; may be `out` itself.
        joint_lse: [B, R, N, 1], float32; may be `lse` itself.
    """
    torch.ops.wan21.join_attention(result, joint_lse, out, lse, more, more_lse)


def join_attention_plainly(
    out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor, result: Tensor, joint_lse: Tensor
) -> None:
    """`join_attention` in torch's own operators.

    Memory: three [B, R, N, K] in float32.
    """
    share = torch.sigmoid(more_lse - lse)  # of the second in both together
    joint = torch.logaddexp(lse, more_lse)
    result.copy_(torch.lerp(out.float(), more.float(), share))
    joint_lse.copy_(joint)


def _modulate_reference(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype, norm_dtype: torch.dtype
) -> Tensor:
    normed = functional.layer_norm(x, (x.shape[-1],), eps=eps).to(norm_dtype).float()
    return torch.addcmul(shift, normed, scale).to(dtype)


def _modulate_shape(
    x: Tensor,
    scale: Tensor,  # noqa: ARG001
    shift: Tensor,  # noqa: ARG001
    eps: float,  # noqa: ARG001
    dtype: torch.dtype,
    norm_dtype: torch.dtype,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _rms_heads_reference(out: Tensor, x: Tensor, weight: Tensor, turns: Tensor | None, eps: float) -> None:
    normed = functional.rms_norm(x, (x.shape[-1],), eps=eps) * weight
    heads = normed.unflatten(-1, (-1, out.shape[-1]))
    heads = heads if turns is None else rotate(heads, torch.view_as_complex(turns))
    out.copy_(heads.view(out.shape))


def _add_gated_reference(x: Tensor, branch: Tensor, gate: Tensor | None) -> None:
    if gate is None:
        x.add_(branch)
    else:
        x.addcmul_(branch, gate)


def _linear_gelu_reference(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    torch.ops.aten.gelu_(torch.addmm(bias, x, weight.t(), out=out), approximate="tanh")


def _linear_gelu_on_cuda(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    torch._addmm_activation(bias, x, weight.t(), use_gelu=True, out=out)  # noqa: SLF001  # no public name


def _modulate_on_cuda(
    x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype, norm_dtype: torch.dtype
) -> Tensor:
    from wan21.kernels.gpu import tokens

    return tokens.modulate(x, scale, shift, eps, dtype, norm_dtype)


def _rms_heads_on_cuda(out: Tensor, x: Tensor, weight: Tensor, turns: Tensor | None, eps: float) -> None:
    from wan21.kernels.gpu import tokens

    tokens.rms_heads_(out, x, weight, turns, eps)


def _add_gated_on_cuda(x: Tensor, branch: Tensor, gate: Tensor | None) -> None:
    from wan21.kernels.gpu import tokens

    tokens.add_gated_(x, branch, gate)


def _attend_counted_reference(q: Tensor, k: Tensor, v: Tensor, repeats: int) -> Tensor:
    raised = None
    if repeats > 1:
        raised = torch.zeros(q.shape[1], k.shape[1], dtype=q.dtype, device=q.device)
        raised[:, -1] = math.log(repeats)
    heads = functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=raised
    )
    return heads.transpose(1, 2).flatten(2)


def _attend_counted_shape(q: Tensor, k: Tensor, v: Tensor, repeats: int) -> Tensor:  # noqa: ARG001
    return q.new_empty(*q.shape[:2], q.shape[2] * q.shape[3])


def _attend_counted_on_cuda(q: Tensor, k: Tensor, v: Tensor, repeats: int) -> Tensor:
    from wan21.kernels.gpu import prompt

    return prompt.attend_counted(q, k, v, repeats)


def _join_attention_reference(
    result: Tensor, joint_lse: Tensor, out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor
) -> None:
    join_attention_plainly(out, lse, more, more_lse, result, joint_lse)


def _join_attention_on_cuda(
    result: Tensor, joint_lse: Tensor, out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor
) -> None:
    from wan21.kernels.gpu import ring

    ring.join_attention(result, joint_lse, out, lse, more, more_lse)


def _nothing(*_: object) -> None:
    """The shape of no result."""


_LIBRARY.define(
    "modulate(Tensor x, Tensor scale, Tensor shift, float eps, ScalarType dtype, ScalarType norm_dtype) -> Tensor"
)
_LIBRARY.define("rms_heads_(Tensor(a!) out, Tensor x, Tensor weight, Tensor? turns, float eps) -> ()")
_LIBRARY.define("add_gated_(Tensor(a!) x, Tensor branch, Tensor? gate) -> ()")
_LIBRARY.define("linear_gelu(Tensor(a!) out, Tensor x, Tensor weight, Tensor bias) -> ()")
_LIBRARY.define(
    "join_attention(Tensor(a!) result, Tensor(b!) joint_lse, Tensor out, Tensor lse, Tensor more, Tensor more_lse) "
    "-> ()"
)
_LIBRARY.define("attend_counted(Tensor q, Tensor k, Tensor v, int repeats) -> Tensor")
for _name, _reference, _cuda, _shape in (
    ("modulate", _modulate_reference, _modulate_on_cuda, _modulate_shape),
    ("rms_heads_", _rms_heads_reference, _rms_heads_on_cuda, _nothing),
    ("add_gated_", _add_gated_reference, _add_gated_on_cuda, _nothing),
    ("linear_gelu", _linear_gelu_reference, _linear_gelu_on_cuda, _nothing),
    ("join_attention", _join_attention_reference, _join_attention_on_cuda, _nothing),
    ("attend_counted", _attend_counted_reference, _attend_counted_on_cuda, _attend_counted_shape),
):
    _LIBRARY.impl(_name, _reference, "CPU")
    _LIBRARY.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"wan21::{_name}", _shape, lib=_LIBRARY)
