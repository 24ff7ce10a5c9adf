"""Weights quantised while they are loaded."""

from collections.abc import Collection

import torch

from wan21.kernels.fp8 import FP8, scale_rows_
from wan21.weights.components import Source
from wan21.weights.staging import pieces

SCALE = "_scale"
"""What the name of a weight's scales has behind that of the weight."""


class ScaledSource(Source):
    """Another source, some of whose weights are stored in eight bits with a scale for each output row.

    A row depends on nothing but itself, so any stretch of a weight can be had, as from any source. Scales that were
    worked out with a weight are kept for when they are asked for; others are worked out then.

    Args:
        source: of the weights as they are; closed with this one.
        names: of those that are quantised; each has two dimensions.
        device: where that happens.
        dtype: of what is stored: e4m3 or int8.

    Memory: on that device STAGING_BYTES, and what the source stages; on the host four bytes for each output row.
    """

    def __init__(self, source: Source, names: Collection[str], device: torch.device, dtype: torch.dtype = FP8) -> None:
        self._source = source
        self._names = frozenset(names)
        self._device = device
        self._dtype = dtype
        self._scales: dict[str, torch.Tensor] = {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = self._source.shapes()
        return shapes | {f"{name}{SCALE}": (shapes[name][0], 1) for name in self._names if name in shapes}

    def shape(self, name: str) -> tuple[int, ...]:
        weight = self._weight_of(name)
        return self._source.shape(name) if weight is None else (self._source.shape(weight)[0], 1)

    def write_part(self, name: str, destination: torch.Tensor, first: int) -> None:
        weight = self._weight_of(name)
        if weight is not None:
            self._write_scales(weight, destination, first)
        elif name in self._names:
            self._write_values(name, destination, first)
        else:
            self._source.write_part(name, destination, first)

    def close(self) -> None:
        self._scales.clear()
        self._source.close()

    def _weight_of(self, name: str) -> str | None:
        """The weight whose scales have this name."""
        weight = name.removesuffix(SCALE)
        return weight if weight != name and weight in self._names else None

    def _write_values(self, name: str, destination: torch.Tensor, first: int) -> None:
        width, stop = self._source.shape(name)[1], first + destination.numel()
        first_row = first // width
        for rows in pieces(-(-stop // width) - first_row, width * _STAGED_BYTES):
            start = (first_row + rows.start) * width
            values = self._quantized(name, first_row + rows.start, first_row + rows.stop).view(-1)
            begin, end = max(first, start), min(stop, start + values.numel())
            destination[begin - first : end - first].copy_(values[begin - start : end - start])

    def _write_scales(self, name: str, destination: torch.Tensor, first: int) -> None:
        known, rows = self._known(name), slice(first, first + destination.numel())
        missing = known[rows].isnan().nonzero().view(-1)
        if missing.numel():
            start, stop = first + int(missing[0]), first + int(missing[-1]) + 1
            for part in pieces(stop - start, self._source.shape(name)[1] * _STAGED_BYTES):
                self._quantized(name, start + part.start, start + part.stop)
        destination.copy_(known[rows])

    def _known(self, name: str) -> torch.Tensor:
        if name not in self._scales:
            self._scales[name] = torch.full((self._source.shape(name)[0],), torch.nan)
        return self._scales[name]

    def _quantized(self, name: str, start: int, stop: int) -> torch.Tensor:
        width = self._source.shape(name)[1]
        staged = torch.empty((stop - start, width), dtype=torch.float32, device=self._device)
        self._source.write_part(name, staged.view(-1), start * width)
        values, scale = scale_rows_(staged, self._dtype)
        self._known(name)[start:stop] = scale.view(-1).cpu()
        return values


_STAGED_BYTES = torch.float32.itemsize + FP8.itemsize
"""Of each element: as it is, and quantised."""
