"""The causal video VAE."""

from wan21.vae.vae import Vae

__all__ = ["Vae"]
