"""Rotary positions on a grid of time, height and width.

Letters: B videos, L tokens, N heads, K head width.

Reference: RoFormer (arXiv 2104.09864); the split of a head's width over three axes is that of Wan2.1.
"""

import torch

BASE = 10000.0


def axis_widths(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's elements turn with time, height and width (44, 42, 42 of 128)."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rotations(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> torch.Tensor:
    """Unit complex numbers that turn each pair of elements of each token: [L, 1, K/2], complex64.

    Angles are formed in float64, as upstream does, and stored in single precision.

    Memory: the result (8 bytes * L * K/2), twice for a moment.
    """
    axes = []
    for axis, (size, width) in enumerate(zip(grid, axis_widths(head_dim), strict=True)):
        position = torch.arange(size, dtype=torch.float64, device=device)
        speed = BASE ** (-torch.arange(0, width, 2, dtype=torch.float64, device=device) / width)
        angles = torch.outer(position, speed)
        turns = torch.complex(angles.cos(), angles.sin()).to(torch.complex64)
        layout = [1, 1, 1, width // 2]
        layout[axis] = size
        axes.append(turns.view(layout).expand(*grid, width // 2))
    return torch.cat(axes, dim=-1).view(-1, 1, head_dim // 2)


def rotate(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turns adjacent elements as pairs; in place unless gradients are kept.

    Args:
        x: [B, L, N, K], float32, contiguous in its last two dimensions.
        turns: [L, 1, K/2], complex64.

    Returns:
        [B, L, N, K], float32.
    """
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
    if torch.is_grad_enabled():
        return torch.view_as_real(pairs * turns).flatten(-2)
    pairs.mul_(turns)
    return x
