"""The encoder of UMT5, which turns prompt tokens into what the diffusion transformer attends to.

Letters: B prompts; S prompt tokens; D model width; N heads; K head width; M feed-forward width.

Departures from other encoders: scores are not divided by sqrt(K); no layer has a bias; positions enter as a bias on
the scores, and every layer has its own (in plain T5 the first layer's serves all). Where bfloat16 is rounded matters
at the scale of its precision, so each formula below is evaluated in the stated dtype, operation by operation.

There is no padding mask: only real tokens come in, which gives the same values as padding to 512 and masking.

Reference: UMT5 (openreview kXwdL1cWOAi) on T5 (arXiv 1910.10683); buckets and norms as released.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from wan21.models import TextEncoderConfig
from wan21.parts import InParts

# Heads whose scores are in float32 at a time, for the softmax. With 64 heads in bfloat16 a few launches more bring the
# peak from 6 times the scores down to 2.5 times.
HEADS_AT_ONCE = 8


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh approximation of GELU, rounded to the input's dtype after each operation. Modifies x.

    The fused `torch.nn.functional.gelu` rounds once at the end, and differs in bfloat16.

    Reference: GELU (arXiv 1606.08415), section 2.

    Args:
        x: [...], nobody else's; it becomes the result.

    Memory:
        One tensor like x.
    """
    inner = x.pow(3.0).mul_(0.044715).add_(x).mul_(math.sqrt(2 / math.pi))
    return x.mul_(0.5).mul_(inner.tanh_().add_(1.0))


def residual_sum(x: Tensor, change: Tensor) -> Tensor:
    """The sum, kept inside the range of float16 where that is the dtype. Modifies the change.

    The limit is 1000 below the largest number and always in force. (The official code clamps only if some sum is
    infinite, which would make the host wait for the device; the two differ for finite sums above 64504 alone.)

    Args:
        x: [B, S, D], left as it is.
        change: [B, S, D], nobody else's; it becomes the result.
    """
    change.add_(x)
    if change.dtype == torch.float16:
        limit = torch.finfo(torch.float16).max - 1000
        change.clamp_(-limit, limit)
    return change


def bucket_starts(num_buckets: int, max_distance: int) -> list[int]:
    """The smallest distance that belongs to bucket 1, 2, ... of one direction.

    The first half of a direction's buckets hold one distance each. The others widen geometrically, such that the one
    after the last would start at `max_distance`. Found in integers, so that no device rounds a power differently.

    Reference: T5 (arXiv 1910.10683), section 2.1.
    """
    per_direction = num_buckets // 2
    exact = per_direction // 2
    widening = per_direction - exact
    starts = list(range(1, exact + 1))
    for step in range(1, widening):
        # The smallest distance of at least exact * (max_distance / exact) ** (step / widening).
        power = max_distance**step * exact ** (widening - step)
        starts.append(next(n for n in range(exact, max_distance + 1) if n**widening >= power))
    return starts


def relative_buckets(distance: Tensor, *, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance between a key and a query.

    Args:
        distance: [...] int64, position of the key minus position of the query.
        num_buckets: of both directions together.
        max_distance: from here on all distances share the last bucket.

    Returns:
        [...] int64, from 0 up to `num_buckets` - 1; keys after the query have the upper half.
    """
    starts = torch.tensor(bucket_starts(num_buckets, max_distance), device=distance.device)
    return torch.bucketize(distance.abs(), starts, right=True) + (distance > 0) * (num_buckets // 2)


class RMSNorm(nn.Module):
    """Scales each token to unit mean square, then by a weight per channel.

    The root is taken in float32; the scaled token is cast to the weight's dtype before the weight is applied.

    Reference: RMSNorm (arXiv 1910.07467).

    Memory:
        Two [B, S, D] in float32.
    """

    def __init__(self, dim: int, *, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] in, [B, S, D] out, in the weight's dtype."""
        mean_square = x.float().square().mean(-1, keepdim=True)
        return (x * torch.rsqrt(mean_square + self.eps)).to(self.weight.dtype) * self.weight


def _embedding(num_rows: int, dim: int, dtype: torch.dtype) -> nn.Embedding:
    """A table that somebody else fills; torch's own filling, on the meta device, imports half of its compiler."""
    return nn.Embedding.from_pretrained(torch.empty(num_rows, dim, dtype=dtype), freeze=False)


class RelativeBias(nn.Module):
    """What a layer adds to the scores of its heads, by the distance between key and query."""

    def __init__(self, config: TextEncoderConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.max_distance = config.max_distance
        self.embedding = _embedding(config.num_buckets, config.num_heads, dtype)

    def forward(self, length: int) -> Tensor:
        """The bias for all pairs among so many tokens: [N, S, S], queries before keys.

        Memory:
            The result, and one [S, S] of indices.
        """
        device = self.embedding.weight.device
        position = torch.arange(length, device=device)
        buckets = relative_buckets(
            torch.arange(1 - length, length, device=device),
            num_buckets=self.embedding.num_embeddings,
            max_distance=self.max_distance,
        )
        per_distance = self.embedding(buckets).T  # [N, 2S - 1]
        return per_distance[:, position - position[:, None] + (length - 1)]


class Attention(nn.Module):
    """Self-attention without scaling; softmax in float32, all else in the module's dtype."""

    def __init__(self, config: TextEncoderConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        inner = config.num_heads * config.head_dim
        self.q = nn.Linear(config.dim, inner, bias=False, dtype=dtype)
        self.k = nn.Linear(config.dim, inner, bias=False, dtype=dtype)
        self.v = nn.Linear(config.dim, inner, bias=False, dtype=dtype)
        self.o = nn.Linear(inner, config.dim, bias=False, dtype=dtype)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        """Every token, having looked at every other.

        Args:
            x: [B, S, D].
            bias: [N, S, S], added to the scores.

        Returns:
            [B, S, D].

        Memory:
            One [B, N, S, S], and two in float32 of so many heads as pass through the softmax at once.
        """
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, N, S, K]
            for layer in (self.q, self.k, self.v)
        )
        scores = (q @ k.transpose(-1, -2)).add_(bias)  # [B, N, S, S]
        for head in range(0, scores.shape[1], HEADS_AT_ONCE):
            part = scores[:, head : head + HEADS_AT_ONCE]
            part.copy_(part.softmax(-1, dtype=torch.float32))
        mixed = scores @ v  # [B, N, S, K]
        return self.o(mixed.transpose(1, 2).flatten(2))  # copies


class FeedForward(nn.Module):
    """Gated feed-forward: `fc2(fc1(x) * gelu(gate(x)))`.

    Reference: GLU variants (arXiv 2002.05202), GEGLU.
    """

    def __init__(self, config: TextEncoderConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        # The released name of its weight is gate.0.weight.
        self.gate = nn.Sequential(nn.Linear(config.dim, config.ffn_dim, bias=False, dtype=dtype))
        self.fc1 = nn.Linear(config.dim, config.ffn_dim, bias=False, dtype=dtype)
        self.fc2 = nn.Linear(config.ffn_dim, config.dim, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] in, [B, S, D] out.

        Memory:
            Two [B, S, M].
        """
        gate = gelu_tanh(self.gate(x))
        return self.fc2(gate.mul_(self.fc1(x)))


class Block(InParts):
    """Attention, then feed-forward, each on the normed residual stream."""

    PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": ("norm1", "attn", "pos_embedding"),
        "feed_forward": ("norm2", "ffn"),
    }

    def __init__(self, config: TextEncoderConfig, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.dim, eps=config.eps, dtype=dtype)
        self.attn = Attention(config, dtype=dtype)
        self.norm2 = RMSNorm(config.dim, eps=config.eps, dtype=dtype)
        self.ffn = FeedForward(config, dtype=dtype)
        self.pos_embedding = RelativeBias(config, dtype=dtype)

    def forward(self, *streams: Tensor) -> tuple[Tensor, ...]:
        """Each [B, S, D] in, [B, S, D] out, in one visit of the weights; what came in is left as it is."""
        with self.part("attention"):
            streams = tuple(residual_sum(x, self.attn(self.norm1(x), self.pos_embedding(x.shape[1]))) for x in streams)
        with self.part("feed_forward"):
            return tuple(residual_sum(x, self.ffn(self.norm2(x))) for x in streams)


class TextEncoder(nn.Module):
    """The whole encoder. Built on the meta device, it takes the released weights strictly; it has no buffers.

    For inference: intermediate tensors are modified in place.

    Args:
        config: sizes.
        dtype: of the weights, and of all that is not said to be float32.
    """

    def __init__(self, config: TextEncoderConfig, *, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.token_embedding = _embedding(config.vocab_size, config.dim, dtype)
        self.blocks = nn.ModuleList(Block(config, dtype=dtype) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.dim, eps=config.eps, dtype=dtype)

    def forward(self, ids: Tensor, blocks: Iterable[nn.Module] | None = None) -> Tensor:
        """What each token means in its prompt.

        Args:
            ids: [B, S] int64 without padding: prompts of different lengths go through `encode`.
            blocks: what to run instead of `self.blocks`, in order; for those who listen to them.

        Returns:
            [B, S, D] in the module's dtype.
        """
        return self.encode([ids], blocks)[0]

    def encode(self, prompts: Sequence[Tensor], blocks: Iterable[nn.Module] | None = None) -> list[Tensor]:
        """The same for prompts of different lengths, each block being visited once for all of them.

        The table of tokens may lie elsewhere than the rest: of its 2.1 GB a prompt needs a few rows.

        Memory:
            All streams, and of one of them what a block needs; the largest are bias and scores, a [N, S, S] and a
            [B, N, S, S]. For UMT5-XXL at S = 512 in bfloat16: 34 MB each.
        """
        table = self.token_embedding.weight.device
        streams = tuple(self.token_embedding(ids.to(table)).to(self.norm.weight.device) for ids in prompts)
        for block in self.blocks if blocks is None else blocks:
            streams = block(*streams)
        return [self.norm(x) for x in streams]
