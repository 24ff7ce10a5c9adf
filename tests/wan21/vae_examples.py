"""VAEs and latents that the tests of the VAE share."""

import torch
from torch import Tensor

from wan21.models import VaeConfig
from wan21.vae import Vae


def random_vae(base_dim: int, dtype: torch.dtype = torch.float32, *, head_scale: float = 0.3) -> Vae:
    """Weights that keep activations of order 1, with gammas and biases that matter.

    Args:
        base_dim: channels at full resolution.
        dtype: of the parameters.
        head_scale: factor of the last layer's weights; small, pixels stay clear of the clamp, which hides differences.
    """
    generator = torch.Generator().manual_seed(0)
    vae = Vae(VaeConfig(base_dim=base_dim), dtype=dtype).requires_grad_(False)
    for name, parameter in vae.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if name.endswith("gamma"):
            parameter.copy_(1 + 0.3 * values)
        elif name.endswith("bias"):
            parameter.copy_(0.1 * values)
        else:
            parameter.copy_(values / parameter[0].numel() ** 0.5)
    vae.decoder.head["2"].weight.mul_(head_scale)
    return vae


def random_latents(*shape: int) -> Tensor:
    """Normal values from a fixed seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def distance(actual: Tensor, expected: Tensor) -> float:
    """The largest difference; the shapes have to be equal."""
    assert actual.shape == expected.shape
    return (actual - expected).abs().max().item()
