"""The causal video VAE."""

from wan21.vae.budget import Budget
from wan21.vae.choose import choose_plan
from wan21.vae.encode_budget import EncodeBudget
from wan21.vae.plan import WHOLE, DecodePlan, Piece
from wan21.vae.vae import Vae

__all__ = ["WHOLE", "Budget", "DecodePlan", "EncodeBudget", "Piece", "Vae", "choose_plan"]
