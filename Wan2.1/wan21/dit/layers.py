"""The parts of a DiT block.

Letters: B videos, L tokens, S prompt tokens, D model width, N heads, K head width, M feed-forward width.

Number formats follow what upstream computes under bfloat16 autocast (docs/parity.md): the residual stream, norms,
modulation and gates are float32; linear layers and attention run in the module's compute dtype.

All per-token work goes over the tokens in chunks of rows and adds into the residual in place, so no temporary
but keys, values and queries is as long as the video. With gradients kept there is one chunk and nothing is in place.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from wan21.attention import attend
from wan21.config import DitConfig
from wan21.rope import rotate

MOST_ROWS = 4096
"""Tokens handled at once, at most, all videos of a batch together: enough for a GPU's matrix products."""

FEWEST_ROWS = 64
"""Below this the loop costs more than the memory is worth."""


def chunk_rows(x: torch.Tensor) -> int:
    """How many tokens of each video of [B, L, D] are handled at once: an eighth, within limits."""
    batch_size, num_rows = x.shape[:2]
    return max(FEWEST_ROWS, min(MOST_ROWS // batch_size, -(-num_rows // 8)))


def row_slices(rows: slice, size: int) -> Iterator[slice]:
    """Consecutive slices of at most `size` rows; one slice of all of them where gradients are kept."""
    if torch.is_grad_enabled():
        size = rows.stop - rows.start
    for start in range(rows.start, rows.stop, size):
        yield slice(start, min(start + size, rows.stop))


def by_rows(rows: slice, size: int, produce: Callable[[slice], tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """What `produce` gives for these rows, worked out `size` rows at a time and written into whole tensors.

    Memory: the results, and one chunk of each.
    """
    wholes: tuple[torch.Tensor, ...] | None = None
    num_rows = rows.stop - rows.start
    for part in row_slices(rows, size):
        chunks = produce(part)
        if part.stop - part.start == num_rows:
            return chunks
        if wholes is None:
            wholes = tuple(chunk.new_empty(chunk.shape[0], num_rows, *chunk.shape[2:]) for chunk in chunks)
        for whole, chunk in zip(wholes, chunks, strict=True):
            whole[:, part.start - rows.start : part.stop - rows.start] = chunk
        del chunks, chunk, whole  # or they would stand beside the next ones
    if wholes is None:
        raise ValueError(f"rows={rows} is empty")
    return wholes


@dataclass(frozen=True)
class Modulation:
    """What the timestep does to one branch; each [B or 1, 1, D], float32."""

    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor


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
        normed = functional.rms_norm(x.float(), (x.shape[-1],), eps=self.eps)
        return normed.to(x.dtype) * self.weight


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
    """
    normed = layer_norm(x, eps).to(norm_dtype)
    return torch.addcmul(modulation.shift, normed, 1 + modulation.scale).to(dtype)


def add_branch(
    residual: torch.Tensor, rows: slice, branch: torch.Tensor, gate: torch.Tensor | None = None
) -> torch.Tensor:
    """The residual with a branch, times its gate, added to some rows; in place unless gradients are kept.

    Args:
        residual: [B, L, D], float32.
        rows: which tokens the branch speaks of; all of them where gradients are kept.
        branch: [B, rows, D] in the compute dtype.
        gate: [B or 1, 1, D], float32.

    Returns:
        The residual, [B, L, D].
    """
    if torch.is_grad_enabled():
        return residual + (branch if gate is None else branch * gate)
    if gate is None:
        residual[:, rows].add_(branch)
    else:
        residual[:, rows].addcmul_(branch, gate)
    return residual


class SelfAttention(nn.Module):
    """Attention of the video's tokens to each other, with rotary positions."""

    def __init__(self, config: DitConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.eps = config.eps
        dim = config.dim
        self.q = nn.Linear(dim, dim, dtype=dtype)
        self.k = nn.Linear(dim, dim, dtype=dtype)
        self.v = nn.Linear(dim, dim, dtype=dtype)
        self.o = nn.Linear(dim, dim, dtype=dtype)
        self.norm_q = RmsNorm(dim, config.eps)
        self.norm_k = RmsNorm(dim, config.eps)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.num_heads, -1))  # [B, L, N, K]

    def _rotated(self, projected: torch.Tensor, norm: RmsNorm, turns: torch.Tensor) -> torch.Tensor:
        return rotate(self._heads(norm(projected)), turns).to(projected.dtype)

    def forward(
        self,
        residual: torch.Tensor,
        modulation: Modulation,
        turns: torch.Tensor,
        query_slices: int,
        norm_dtype: torch.dtype,
    ) -> torch.Tensor:
        """The residual with this branch added.

        Keys and values of all tokens come first. With one slice the queries are kept too; with more, each slice of
        queries is formed, attends, and is added to the residual before the next one begins. A token's normed input
        depends on its own residual only, so adding early changes nothing.

        Args:
            residual: [B, L, D], float32; written to.
            modulation: shift, scale and gate of this branch.
            turns: rotary positions, [L, 1, K/2], complex64.
            query_slices: into how many slices the queries are cut.
            norm_dtype: what the norm's output is rounded to.

        Returns:
            [B, L, D], float32.

        Memory: keys, values and one slice of queries and of outputs, [B, L, D] each in the compute dtype.
        """
        tokens = slice(0, residual.shape[1])
        size = chunk_rows(residual)
        whole = query_slices == 1

        def project(rows: slice, *, keys: bool, queries: bool) -> tuple[torch.Tensor, ...]:
            x = modulated(residual[:, rows], modulation, self.eps, self.q.weight.dtype, norm_dtype)
            parts = []
            if keys:
                parts += [self._rotated(self.k(x), self.norm_k, turns[rows]), self._heads(self.v(x))]
            if queries:
                parts.append(self._rotated(self.q(x), self.norm_q, turns[rows]))
            return tuple(parts)

        k, v, *q_whole = by_rows(tokens, size, lambda rows: project(rows, keys=True, queries=whole))
        for rows in row_slices(tokens, -(-tokens.stop // query_slices)):
            q = q_whole.pop() if whole else by_rows(rows, size, lambda part: project(part, keys=False, queries=True))[0]
            attended = attend(q, k, v)
            del q
            for part in row_slices(rows, size):
                branch = self.o(attended[:, part.start - rows.start : part.stop - rows.start])
                residual = add_branch(residual, part, branch, modulation.gate)
                del branch
            del attended
        return residual


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

    def forward(self, residual: torch.Tensor, norm: nn.LayerNorm, context: torch.Tensor) -> torch.Tensor:
        """The residual with this branch added.

        Args:
            residual: [B, L, D], float32; written to.
            norm: what the queries' input passes first.
            context: [B, S, D] in the compute dtype.

        Returns:
            [B, L, D], float32.
        """
        dtype = self.q.weight.dtype
        k = self.norm_k(self.k(context)).to(dtype).unflatten(-1, (self.num_heads, -1))
        v = self.v(context).unflatten(-1, (self.num_heads, -1))
        for rows in row_slices(slice(0, residual.shape[1]), chunk_rows(residual)):
            q = self.norm_q(self.q(norm(residual[:, rows]).to(dtype))).to(dtype)
            attended = attend(q.unflatten(-1, (self.num_heads, -1)), k, v)
            residual = add_branch(residual, rows, self.o(attended))
            del q, attended
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
