"""How the transformer looks at pictures: their tokens stand before those of the prompt.

Letters: B videos, I image tokens of all pictures, S prompt tokens, D model width, N heads, K head width.
"""

import torch
from torch import nn

from wan21.dit.context import Context
from wan21.dit.layers import CrossAttention, Read
from wan21.dit.operations import Operations, RmsNorm
from wan21.models import DitConfig

EPS = 1e-5
"""Of the norms around the projection, which are not the transformer's own."""


class ImageEmbedding(nn.Module):
    """Projects CLIP's tokens to the transformer's width; where there are several pictures, with learned positions."""

    def __init__(self, config: DitConfig, dtype: torch.dtype) -> None:
        super().__init__()
        width = config.image_dim
        self.dtype = dtype
        self.proj = nn.Sequential(
            nn.LayerNorm(width, eps=EPS, dtype=torch.float32),
            nn.Linear(width, width, dtype=dtype),
            nn.GELU(),
            nn.Linear(width, config.dim, dtype=dtype),
            nn.LayerNorm(config.dim, eps=EPS, dtype=torch.float32),
        )
        self.emb_pos: nn.Parameter | None = None
        if config.num_image_positions:
            self.emb_pos = nn.Parameter(torch.empty(1, config.num_image_positions, width, dtype=torch.float32))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """What cross attention reads of the pictures of one video.

        Args:
            tokens: of CLIP, [pictures, I / pictures, image_dim].

        Returns:
            [1, I, D] in the compute dtype. (Upstream's is float32 until each block rounds it; the values are the same.)
        """
        x = tokens.flatten(0, 1)[None].float()
        if self.emb_pos is not None:
            x = x + self.emb_pos
        first_norm, first, gelu, second, last_norm = self.proj
        x = gelu(first(first_norm(x).to(self.dtype)))
        return last_norm(second(x).float()).to(self.dtype)


class ImageCrossAttention(CrossAttention):
    """Attention to the prompt and to the pictures, each with keys and values of its own; the results are added."""

    def __init__(self, config: DitConfig, dtype: torch.dtype, operations: Operations) -> None:
        super().__init__(config, dtype, operations)
        self.k_img = nn.Linear(config.dim, config.dim, dtype=dtype)
        self.v_img = nn.Linear(config.dim, config.dim, dtype=dtype)
        self.norm_k_img = RmsNorm(config.dim, config.eps)

    def reads(self, context: Context) -> list[Read]:
        """Of the prompt, then of the pictures.

        Raises:
            ValueError: there are no pictures.
        """
        if context.pictures is None:
            raise ValueError("context.pictures is missing: this model looks at pictures; make it with embed_pictures")
        return [*super().reads(context), (*self._heads(context.pictures, self.k_img, self.v_img, self.norm_k_img), 1)]
