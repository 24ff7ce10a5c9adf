"""The image tower of CLIP ViT-H/14, which turns a picture into tokens that the diffusion transformer attends to.

What is read are the tokens after the last block but one: the last block, the norm behind it and the projection to
text are in the checkpoint and are never run, so `drop_unread` lets go of them before any weight is read.

Letters: B pictures; I image tokens (a class token and one per patch); D width; N heads; K head width; M feed-forward
width.

Reference: CLIP (arXiv 2103.00020), ViT (arXiv 2010.11929); sizes and weights of open-clip's XLM-RoBERTa ViT-H/14.
"""

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional

from wan21.attention import attend
from wan21.models import ClipConfig
from wan21.parts import InParts


class LayerNorm(nn.LayerNorm):
    """Computed in float32 whatever its weights are stored in, and rounded to the input's dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, I, D] in, [B, I, D] out."""
        normed = functional.layer_norm(
            x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps
        )
        return normed.to(x.dtype)


class Attention(nn.Module):
    """Attention of a picture's tokens to each other."""

    def __init__(self, config: ClipConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.to_qkv = nn.Linear(config.dim, 3 * config.dim, dtype=dtype)
        self.proj = nn.Linear(config.dim, config.dim, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, I, D] in, [B, I, D] out."""
        q, k, v = self.to_qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # [B, I, N, K] each
        return self.proj(attend(q, k, v))


class Block(InParts):
    """Attention, then feed-forward, each on the normed residual stream."""

    PARTS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "attention": ("norm1", "attn"),
        "feed_forward": ("norm2", "mlp"),
    }

    def __init__(self, config: ClipConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm1 = LayerNorm(config.dim, eps=config.eps, dtype=dtype)
        self.attn = Attention(config, dtype)
        self.norm2 = LayerNorm(config.dim, eps=config.eps, dtype=dtype)
        self.mlp = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim, dtype=dtype),
            nn.GELU(),
            nn.Linear(config.ffn_dim, config.dim, dtype=dtype),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, I, D] in, [B, I, D] out."""
        with self.part("attention"):
            x = x + self.attn(self.norm1(x))
        with self.part("feed_forward"):
            return x + self.mlp(self.norm2(x))


class ImageEncoder(nn.Module):
    """The image tower, with the attribute names of its checkpoint.

    Build it on the meta device and let `wan21.weights` fill it.

    Args:
        config: sizes.
        dtype: of weights and residual stream; norms are computed in float32.
    """

    def __init__(self, config: ClipConfig, *, dtype: torch.dtype = torch.float16) -> None:
        super().__init__()
        dim = config.dim
        self.config = config
        self.dtype = dtype
        self.cls_embedding = nn.Parameter(torch.empty(1, 1, dim, dtype=dtype))
        self.pos_embedding = nn.Parameter(torch.empty(1, config.num_tokens, dim, dtype=dtype))
        # A convolution whose stride is its kernel: run as a linear layer over patches, kept in the checkpoint's shape.
        self.patch_embedding = nn.Conv2d(3, dim, config.patch_size, config.patch_size, bias=False, dtype=dtype)
        self.pre_norm = LayerNorm(dim, eps=config.eps, dtype=dtype)
        self.transformer = nn.ModuleList(Block(config, dtype) for _ in range(config.num_layers))
        self.post_norm: LayerNorm | None = LayerNorm(dim, eps=config.eps, dtype=dtype)
        self.head: nn.Parameter | None = nn.Parameter(torch.empty(dim, config.text_dim, dtype=dtype))

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, under the name that all streamed networks have."""
        return self.transformer

    def drop_unread(self) -> None:
        """Lets go of what comes after the tokens that are read: 3 % of the weights."""
        del self.transformer[self.config.num_layers - 1 :]
        self.post_norm = None
        self.head = None

    def forward(self, pixels: torch.Tensor, blocks: Iterable[nn.Module] | None = None) -> torch.Tensor:
        """The tokens of each picture after the last block but one, not normed.

        Args:
            pixels: from `preprocess`, [B, 3, image_size, image_size].
            blocks: what to run instead of `self.blocks`, in order; for those who listen to them.

        Returns:
            [B, I, D] in the module's dtype.

        Memory: a few [B, I, D] and one [B, I, M].
        """
        size = self.config.patch_size
        patches = pixels.to(self.dtype).unflatten(2, (-1, size)).unflatten(4, (-1, size))
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # copies; [B, I - 1, 3 * size * size]
        x = functional.linear(patches, self.patch_embedding.weight.flatten(1))
        x = torch.cat([self.cls_embedding.expand(x.shape[0], -1, -1), x], dim=1)
        x = self.pre_norm(x + self.pos_embedding)
        for block in self.transformer[: self.config.num_layers - 1] if blocks is None else blocks:
            x = block(x)
        return x
