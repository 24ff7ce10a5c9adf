"""The parts of a DiT block.

Letters: B videos, L tokens, S prompt tokens, D model width, N heads, K head width, M feed-forward width.

Number formats follow what upstream computes under bfloat16 autocast (docs/parity.md): the residual stream, norms,
modulation and gates are float32; linear layers and attention run in the module's compute dtype.

All per-token work goes over the tokens in chunks of rows and adds into the residual in place, so no temporary
but keys, values and queries is as long as the video. With gradients kept there is one chunk and nothing is in place.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from wan21.attention import attend
from wan21.config import DitConfig
from wan21.dit.residual import Residual, Window, chunks, windows
from wan21.parts import Enter
from wan21.rope import rotate

FEWEST_ROWS = 64
"""Below this the loop costs more than the memory is worth."""


@dataclass(frozen=True, kw_only=True)
class Slicing:
    """Into what a block cuts its work; none of it changes what is computed.

    query_slices: into how many slices self attention cuts its queries.
    most_rows: how many tokens, of all videos of a batch together, pass through norms and linear layers at once.
    """

    query_slices: int = 1
    most_rows: int = 4096


def chunk_rows(shape: torch.Size, most_rows: int) -> int:
    """How many tokens of each video of a [B, L, D] are handled at once: an eighth, within limits, in equal chunks."""
    batch_size, num_rows = shape[:2]
    most = max(FEWEST_ROWS, min(most_rows // batch_size, -(-num_rows // 8)))
    return -(-num_rows // -(-num_rows // most))


def collect(
    parts: Iterable[Window],
    num_rows: int,
    produce: Callable[[slice, torch.Tensor], tuple[torch.Tensor, ...]],
    wholes: tuple[torch.Tensor, ...] | None = None,
) -> tuple[torch.Tensor, ...]:
    """What `produce` gives for consecutive windows, written into whole tensors.

    Args:
        parts: the windows.
        num_rows: of all of them together.
        produce: from a window to its results, [B, rows, ...] each.
        wholes: to write into, [B, num_rows, ...] each; made if there are none and several windows.

    Memory: the results, and those of one window.
    """
    first: int | None = None
    for rows, x in parts:
        first = rows.start if first is None else first
        results = produce(rows, x)
        if wholes is None:
            if rows.stop - rows.start == num_rows:
                return results
            wholes = tuple(result.new_empty(result.shape[0], num_rows, *result.shape[2:]) for result in results)
        for whole, result in zip(wholes, results, strict=True):
            whole[:, rows.start - first : rows.stop - first] = result
        del results, result, whole  # or they would stand beside the next ones
    if wholes is None:
        raise ValueError(f"num_rows={num_rows} and no window")
    return wholes


@dataclass(frozen=True)
class Modulation:
    """What the timestep does to one branch; each [B or 1, 1, D], float32.

    shift: added to the normed input.
    scale: what the normed input is multiplied by: one plus the network's scale.
    gate: what the branch's result is multiplied by; None for the head, which is no branch.
    """

    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor | None = None


class RmsNorm(nn.Module):
    """Root-mean-square norm over the whole width, before the split into heads.

    Normalised in float32, rounded to the input's dtype, then multiplied by a float32 weight.

    Reference: arXiv 1910.07467.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, D] of any dtype to [B, L, D], float32."""
        return self.normed(x) * self.weight

    def rounded(self, x: torch.Tensor) -> torch.Tensor:
        """The same, rounded to the input's dtype."""
        normed = self.normed(x)
        return (normed * self.weight).to(x.dtype) if torch.is_grad_enabled() else normed.mul_(self.weight)

    def normed(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, D] before the weight; torch's norm computes in float32 and rounds once."""
        return functional.rms_norm(x, (x.shape[-1],), eps=self.eps)


def layer_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Layer norm of a float32 [B, L, D], without weights."""
    return functional.layer_norm(x, (x.shape[-1],), eps=eps)


def modulated(
    x: torch.Tensor, modulation: Modulation, eps: float, dtype: torch.dtype, norm_dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The normed residual, scaled and shifted in float32, then rounded to the compute dtype.

    Args:
        x: [B, L, D], float32.
        modulation: shift and scale.
        eps: of the norm.
        dtype: of the result.
        norm_dtype: what the norm's output is rounded to before it is scaled.

    Returns:
        [B, L, D].

    Memory: one [B, L, D] in float32 beside the result; one more where the norm's output is rounded.
    """
    normed = layer_norm(x, eps).to(norm_dtype).float()
    if torch.is_grad_enabled():
        return torch.addcmul(modulation.shift, normed, modulation.scale).to(dtype)
    return torch.addcmul(modulation.shift, normed, modulation.scale, out=normed).to(dtype)


def add_branch(
    residual: Residual, window: torch.Tensor, branch: torch.Tensor, gate: torch.Tensor | None = None
) -> Residual:
    """The residual with a branch, times its gate, added to a window of it; in place unless gradients are kept.

    Args:
        residual: [B, L, D], float32.
        window: some tokens of it, [B, rows, D]; all of them where gradients are kept.
        branch: [B, rows, D] in the compute dtype.
        gate: [B or 1, 1, D], float32.

    Returns:
        The residual, [B, L, D].
    """
    if torch.is_grad_enabled():
        return window + (branch if gate is None else branch * gate)
    if gate is None:
        window.add_(branch)
    else:
        window.addcmul_(branch, gate)
    return residual


class SelfAttention(nn.Module):
    """Attention of the video's tokens to each other, with rotary positions."""

    def __init__(self, config: DitConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.eps = config.eps
        self.dtype = dtype
        dim = config.dim
        self.q = nn.Linear(dim, dim, dtype=dtype)
        self.k = nn.Linear(dim, dim, dtype=dtype)
        self.v = nn.Linear(dim, dim, dtype=dtype)
        self.o = nn.Linear(dim, dim, dtype=dtype)
        self.norm_q = RmsNorm(dim, config.eps)
        self.norm_k = RmsNorm(dim, config.eps)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1))  # [B, L, N, K]

    def forward(
        self,
        residual: Residual,
        modulation: Modulation,
        turns: torch.Tensor,
        slicing: Slicing,
        norm_dtype: torch.dtype,
        room: torch.Tensor | None,
        part: Enter,
    ) -> Residual:
        """The residual with this branch added.

        Keys and values of all tokens come first, and the queries with them if they are not sliced. Each slice of
        queries is added to the residual before the next one is formed: a token's normed input depends on its own
        residual only.

        Args:
            residual: [B, L, D], float32; written to. One in windows has its queries sliced as it is.
            modulation: shift, scale and gate of this branch.
            turns: rotary positions, [L, 1, K/2], complex64.
            slicing: into what the work is cut.
            norm_dtype: what the norm's output is rounded to.
            room: for keys and values, [2, B, L, N, K] in the compute dtype; None where gradients are kept.
            part: surrounds the use of weights: "keys" of k and v, "queries" of q and o.

        Returns:
            [B, L, D], float32.

        Memory: one slice of queries and of outputs, [B, L, D] each in the compute dtype, and chunks of rows.
        """
        size = chunk_rows(residual.shape, slicing.most_rows)
        num_tokens = residual.shape[1]
        whole = slicing.query_slices == 1 and isinstance(residual, torch.Tensor)

        def project(rows: slice, window: torch.Tensor) -> tuple[torch.Tensor, ...]:
            x = modulated(window, modulation, self.eps, self.dtype, norm_dtype)
            keys_values = self._keys_values(x, turns[rows])
            return (*keys_values, self._queries(x, turns[rows])) if whole else keys_values

        def queries(rows: slice, window: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (self._queries(modulated(window, modulation, self.eps, self.dtype, norm_dtype), turns[rows]),)

        with ExitStack() as parts:
            with part("keys"):
                if whole:
                    parts.enter_context(part("queries"))
                k, v, *q = collect(windows(residual, size), num_tokens, project, _wholes(room, with_queries=whole))
            if not whole:
                parts.enter_context(part("queries"))
            for rows, window in windows(residual, -(-num_tokens // slicing.query_slices), writes=True):
                if not whole:
                    q = list(collect(chunks(window, size, rows.start), rows.stop - rows.start, queries))
                attended = attend(q.pop(), k, v)
                for part_rows, chunk in chunks(window, size):
                    branch = self.o(attended[:, part_rows])
                    residual = add_branch(residual, chunk, branch, modulation.gate)
                    del branch
                del attended  # or it would stand beside the next one
        return residual

    def _keys_values(self, x: torch.Tensor, turns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys with their positions, and values, of a chunk of tokens.

        Args:
            x: [B, rows, D], modulated.
            turns: rotary positions of these tokens, [rows, 1, K/2], complex64.

        Returns:
            [B, rows, N, K] each; with gradients kept in the compute dtype, else the keys still in float32: they are
            rounded where they are written.
        """
        keys = rotate(self._heads(self.norm_k(self.k(x))), turns)
        return keys.to(x.dtype) if torch.is_grad_enabled() else keys, self._heads(self.v(x))

    def _queries(self, x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
        """Queries with their positions, [B, rows, N, K] in the compute dtype; arguments as for keys and values."""
        return rotate(self._heads(self.norm_q(self.q(x))), turns).to(x.dtype)


def _wholes(room: torch.Tensor | None, *, with_queries: bool) -> tuple[torch.Tensor, ...] | None:
    if room is None:
        return None
    return (*room, torch.empty_like(room[0])) if with_queries else tuple(room)


class CrossAttention(nn.Module):
    """Attention of the video's tokens to the prompt; all text positions count, padding included, as upstream."""

    def __init__(self, config: DitConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        dim = config.dim
        self.q = nn.Linear(dim, dim, dtype=dtype)
        self.k = nn.Linear(dim, dim, dtype=dtype)
        self.v = nn.Linear(dim, dim, dtype=dtype)
        self.o = nn.Linear(dim, dim, dtype=dtype)
        self.norm_q = RmsNorm(dim, config.eps)
        self.norm_k = RmsNorm(dim, config.eps)

    def forward(
        self, residual: Residual, norm: nn.LayerNorm, context: torch.Tensor, size: int, part: Enter
    ) -> Residual:
        """The residual with this branch added.

        Keys and values of the prompt are worked out in every pass: that costs less than a thousandth of it, and kept
        for all layers they would take 0.4 GB for each prompt of the 14B model.

        Args:
            residual: [B, L, D], float32; written to.
            norm: what the queries' input passes first.
            context: [B, S, D] in the compute dtype.
            size: tokens handled at once.
            part: surrounds the use of weights: "prompt" of k and v, "cross" of the norm, q and o.

        Returns:
            [B, L, D], float32.
        """
        dtype = self.q.weight.dtype
        with part("prompt"):
            keys = self.norm_k.rounded(self.k(context)).unflatten(-1, (self.num_heads, -1))
            values = self.v(context).unflatten(-1, (self.num_heads, -1))
        with part("cross"):
            for _, window in windows(residual, size, writes=True):
                queries = self.norm_q.rounded(self.q(norm(window).to(dtype))).unflatten(-1, (self.num_heads, -1))
                branch = self.o(attend(queries, keys, values))
                residual = add_branch(residual, window, branch)
                del queries, branch
        return residual


class FeedForward(nn.Sequential):
    """Two linear layers with a tanh-form GELU between them; numbered as in the checkpoint (0 and 2)."""

    def __init__(self, config: DitConfig, dtype: torch.dtype) -> None:
        super().__init__(
            nn.Linear(config.dim, config.ffn_dim, dtype=dtype),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.ffn_dim, config.dim, dtype=dtype),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, L, D] to [B, L, D].

        Memory: one [B, L, M]; the GELU works in place unless gradients are kept.
        """
        hidden = self[0](x)
        hidden = self[1](hidden) if torch.is_grad_enabled() else torch.ops.aten.gelu_(hidden, approximate="tanh")
        return self[2](hidden)
