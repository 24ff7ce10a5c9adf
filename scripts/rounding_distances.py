"""How far latents in bfloat16 are from those in float32, and from one another: what rounding alone does.

Why: a promise such as "within 2e-3 of the plain run" can be kept by other kernels only if rounding itself is smaller.
The plain run and any other are two roundings of the same sums; if each is so far from the run that does not round, they
are as far from each other, unless they share every bit.

How: python scripts/rounding_distances.py [--model tiny] [--device cpu] [--size 832*480] [--frames 81] [--steps 3]
On a GPU, some minutes:  python scripts/rounding_distances.py --model t2v-1.3B --device cuda

Random weights. The run in float32 computes with the weights as bfloat16 has them, so that their own rounding does not
count. Distances are norms of differences over the norm of the second. The last line is the table again, as JSON.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan21.assets import Assets
from wan21.dit.model import Dit
from wan21.errors import WanError
from wan21.models import MODELS, ModelSpec, model_spec
from wan21.options import Options
from wan21.pipeline import VideoPipeline
from wan21.request import Request, make_request
from wan21.runtime import Runtime, make_runtime
from wan21.text.tokenizer import Tokenizer
from wan21.weights.components import Source
from wan21.weights.random import RandomWeights

CUT = {"attention_slices": "auto", "rows_at_once": 64}
LOWEST = {"load_strategy": "part", "offload": True, "attention_slices": "auto"}


class RoundedSource(Source):
    """Another source, some of whose weights are rounded to bfloat16 on the way, whatever they are written to."""

    def __init__(self, source: Source, names: Collection[str]) -> None:
        self._source = source
        self._names = frozenset(names)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """As the other source's."""
        return self._source.shapes()

    def shape(self, name: str) -> tuple[int, ...]:
        """As the other source's."""
        return self._source.shape(name)

    def write_part(self, name: str, destination: torch.Tensor, first: int) -> None:
        """Writes the part, rounded if it is one of those."""
        self._source.write_part(name, destination, first)
        if name in self._names:
            destination.copy_(destination.to(torch.bfloat16))


class RoundedWeights(RandomWeights):
    """Random weights, those of the transformer as a bfloat16 model holds them."""

    def dit(self) -> Source:  # type: ignore[override]  # wrapped
        """Weights of the diffusion transformer."""
        with torch.device("meta"):
            held = Dit(self._spec.dit, dtype=torch.bfloat16)
        names = [name for name, weight in held.named_parameters() if weight.dtype == torch.bfloat16]
        return RoundedSource(super().dit(), names)


@dataclass(frozen=True)
class Row:
    """A run in bfloat16: its distance from the run in float32, and from the plain one."""

    run: str
    from_float32: float
    from_plain: float


def latents(spec: ModelSpec, request: Request, runtime: Runtime, **options: Any) -> torch.Tensor:  # noqa: ANN401 - those of Options
    """The latents of a run, on the host."""
    weights = RoundedWeights(spec, 0, runtime.generator)
    assets = Assets(weights, Tokenizer.built_in(max_tokens=spec.text.text_len), "random")
    pipeline = VideoPipeline(spec, Options(vae_precision="bf16", **options), assets, runtime)
    try:
        return pipeline.generate(request).latents
    finally:
        pipeline.close()


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The norm of the difference over that of the second."""
    return float((one.double() - other.double()).norm() / other.double().norm())


def rows(spec: ModelSpec, request: Request, runtime: Runtime) -> list[Row]:
    """The runs that this device has: the plain one first."""
    runs: dict[str, dict[str, Any]] = {"plain": {}, "queries and rows in pieces": CUT}
    if runtime.device.type == "cuda":
        runs["fused kernels"] = {"kernels": "fused"}
        if importlib.util.find_spec("fa3_fwd_interface"):
            runs["FlashAttention-3 alone"] = {"attention_kernel": "fa3"}
            runs["fused, FlashAttention-3"] = {"kernels": "fused", "attention_kernel": "fa3"}
            runs["the same, lowest_memory's ways"] = {"kernels": "fused", "attention_kernel": "fa3", **LOWEST}
    exact = latents(spec, request, runtime, precision="fp32", offload=True)
    made = {name: latents(spec, request, runtime, precision="bf16", **options) for name, options in runs.items()}
    if runtime.device.type == "cpu":  # which has one kernel only; what follows keeps all scores
        with sdpa_kernel(SDPBackend.MATH):
            made["attention step by step"] = latents(spec, request, runtime, precision="bf16")
    return [Row(name, distance(one, exact), distance(one, made["plain"])) for name, one in made.items()]


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--steps", type=int, default=3)
    flags = parser.parse_args()
    try:
        spec, runtime = model_spec(flags.model), make_runtime(flags.device)
        request = make_request(spec, seed=42, size=flags.size, frame_num=flags.frames, num_steps=flags.steps)
        found = rows(spec, request, runtime)
    except WanError as error:
        print(f"rounding_distances.py: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{flags.model} {request.size}, {request.frame_num} frames, {flags.steps} steps, ", end="")
    print(f"guidance {request.guide_scale:g}")
    print(f"{'run in bf16':<32}{'from float32':>14}{'from plain':>14}")
    for row in found:
        print(f"{row.run:<32}{row.from_float32:>14.2e}{row.from_plain:>14.2e}")
    print(json.dumps([vars(row) for row in found]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
