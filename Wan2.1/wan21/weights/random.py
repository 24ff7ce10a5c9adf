"""Weights from a seed: a whole model to measure with, where no checkpoint is.

Each tensor has a seed of its own, made from the run's seed, the component and the tensor's name. So its values do not
depend on what was drawn before, on where the weight will live, or on whether the other components are drawn at all.
They do depend on the kind of device that draws: CPU and CUDA generators differ.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from wan21.errors import CheckpointError, UsageError
from wan21.models import ModelSpec
from wan21.weights.components import Source
from wan21.weights.load import module_shapes
from wan21.weights.staging import pieces

GeneratorFor = Callable[[int], torch.Generator]


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """Normal values for the tensors whose component and name match.

    The deviation is `std`, divided by the square root of the fan-in (the product of all dimensions but the first) or
    of the width (the last dimension) if `per` says so.
    """

    names: str
    std: float
    mean: float = 0.0
    per: Literal["fan_in", "width", "one"] = "one"


# The first rule that matches "component/name" holds. Together they keep activations of order one through all layers.
_RULES = (
    # The embedding starts T5's residual stream, whose every later addition has order one.
    _Rule(names=r"t5/token_embedding\.weight", std=1.0),
    # T5 does not divide its scores by sqrt(K): q is small instead, so that scores are of order one for K of 32 to 64.
    _Rule(names=r"t5/.*\.attn\.q\.weight", std=0.15, per="fan_in"),
    # Added to the scores, and smaller than they are.
    _Rule(names=r"t5/.*pos_embedding\.embedding\.weight", std=0.3),
    # Pixels saturate beyond -1 and 1; the last layer's input has order one.
    _Rule(names=r"vae/decoder\.head\.2\.weight", std=0.5, per="fan_in"),
    # CLIP's class token stands beside patches of order one, and positions are added to such.
    _Rule(names=r"clip/cls_embedding", std=1.0),
    _Rule(names=r"(clip/pos_embedding|dit/img_emb\.emb_pos)", std=0.3),
    # Stored from width to width, unlike a linear layer's weight.
    _Rule(names=r"clip/head", std=1.0, per="width"),
    # Added to the timestep's projection; small, since scales act as 1 + scale in every block.
    _Rule(names=r"dit/.*modulation", std=1.0, per="width"),
    # Norms: near one, and different for each channel, so that a channel in the wrong place shows.
    _Rule(names=r".*(norm\w*\.weight|gamma|img_emb\.proj\.[04]\.weight)", mean=1.0, std=0.1),
    # Biases: present, and not in the way.
    _Rule(names=r".*\.bias", std=0.02),
    # Linear layers and convolutions: output as large as input.
    _Rule(names=r".*", std=1.0, per="fan_in"),
)


class RandomWeights:
    """A whole model drawn from one seed.

    Args:
        spec: the task.
        seed: any integer.
        generator_for: a new generator from a seed, on the device that shall draw: `runtime.generator`.
    """

    def __init__(self, spec: ModelSpec, seed: int, generator_for: GeneratorFor) -> None:
        self._spec = spec
        self._seed = seed
        self._generator_for = generator_for

    def dit(self) -> "RandomSource":
        """Weights of the diffusion transformer."""
        from wan21.dit.model import Dit

        with torch.device("meta"):
            return self._source("dit", Dit(self._spec.dit, dtype=torch.float32))

    def t5(self) -> "RandomSource":
        """Weights of the text encoder."""
        from wan21.text.umt5 import TextEncoder

        with torch.device("meta"):
            return self._source("t5", TextEncoder(self._spec.text, dtype=torch.float32))

    def clip(self) -> "RandomSource":
        """Weights of the image tower of CLIP.

        Raises:
            UsageError: the task looks at no pictures.
        """
        from wan21.clip.model import ImageEncoder

        if self._spec.clip is None:
            raise UsageError(f"{self._spec.name} looks at no pictures and has no clip; choose an image task")
        with torch.device("meta"):
            return self._source("clip", ImageEncoder(self._spec.clip, dtype=torch.float32))

    def vae(self) -> "RandomSource":
        """Weights of the VAE."""
        from wan21.vae.vae import Vae

        with torch.device("meta"):
            return self._source("vae", Vae(self._spec.vae, dtype=torch.float32))

    def _source(self, component: str, module: torch.nn.Module) -> "RandomSource":
        return RandomSource(component, module_shapes(module), self._seed, self._generator_for)


class RandomSource(Source):
    """One component drawn from a seed; its names and shapes are given."""

    def __init__(
        self, component: str, shapes: Mapping[str, tuple[int, ...]], seed: int, generator_for: GeneratorFor
    ) -> None:
        self._component = component
        self._shapes = dict(shapes)
        self._seed = seed
        self._generator_for = generator_for

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._shapes:
            raise CheckpointError(f"tensor {name} is no weight of the {self._component}; use the names in shapes()")
        return self._shapes[name]

    def write_part(self, name: str, destination: torch.Tensor, first: int) -> None:
        """Fills the destination, flat, with the weight's elements from `first` on.

        What comes before them is drawn too, and dropped: a generator cannot skip.

        Memory: on the generator's device, one piece in float32 and, if that is not the destination's device, the
        same piece in the destination's dtype; together STAGING_BYTES at most.
        """
        shape = self.shape(name)
        mean, std = scale(self._component, name, shape)
        generator = self._generator_for(tensor_seed(self._seed, self._component, name))
        stop = first + destination.numel()
        # Eight bytes per element, whatever the destination: where pieces begin is part of what determines the values.
        for piece in pieces(math.prod(shape), 8):
            if piece.start >= stop:
                break
            drawn = torch.empty(piece.stop - piece.start, dtype=torch.float32, device=generator.device)
            drawn.normal_(mean, std, generator=generator)
            wanted = slice(max(piece.start, first), min(piece.stop, stop))
            if wanted.start >= wanted.stop:
                continue
            drawn = drawn[wanted.start - piece.start : wanted.stop - piece.start]
            to = destination[wanted.start - first : wanted.stop - first]
            # Cast before the way to another device: fewer bytes travel, and staging is bounded on both sides.
            to.copy_(drawn if to.device == drawn.device else drawn.to(to.dtype))


def tensor_seed(seed: int, component: str, name: str) -> int:
    """The 63-bit seed of one tensor."""
    digest = hashlib.sha256(f"{seed}/{component}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def scale(component: str, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values."""
    rule = next(rule for rule in _RULES if re.fullmatch(rule.names, f"{component}/{name}"))
    divisor = {"fan_in": math.prod(shape[1:]), "width": math.prod(shape[-1:]), "one": 1}[rule.per]
    return rule.mean, rule.std / math.sqrt(divisor)
