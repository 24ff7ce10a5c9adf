"""attribution.json as a report reads it: what lay on the device at each peak, by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_sweep.errors import RecordError
from wan_sweep.store import read_json

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Item:
    """Tensors that lie on the device at a peak; equal ones are one item, and `num_bytes` counts all of them.

    Args:
        num_bytes: of all of them together.
        count: how many they are.
        kind: weights, activation, workspace or unattributed.
        component: the network that they belong to.
        phase: where they were made.
        step: in which denoising step, from 0; None outside one.
        block: in which block, from 0; None outside one.
        module: the module's name inside its network; empty where there is none.
        operation: what made them, such as aten::mm.
        shape: of one of them; None where not known.
        dtype: of one of them; empty where not known.
        parameter: the name of the weight that they are; empty for all else.
    """

    num_bytes: int
    count: int
    kind: str
    component: str
    phase: str
    step: int | None
    block: int | None
    module: str
    operation: str
    shape: tuple[int, ...] | None
    dtype: str
    parameter: str

    @property
    def place(self) -> str:
        """Where in the model, in words, such as "dit block 1's self_attn"; the phase where there is no model."""
        if self.parameter:
            return f"{self.component} {self.parameter}".strip()
        return _place(self.component, self.block, self.module) or self.phase

    @property
    def inside(self) -> str:
        """Where inside its network, in words; empty where that is not known."""
        return _place("", self.block, self.module)

    @property
    def origin(self) -> str:
        """What made it, in words, such as "aten::_to_copy float64 [1, 32760, 12, 64]"."""
        shape = None if self.shape is None else f"[{', '.join(map(str, self.shape))}]"
        return " ".join(word for word in (self.operation, self.dtype, shape) if word)


@dataclass(frozen=True, kw_only=True)
class Peak:
    """What lay on the device at one moment; bytes. Weights and activations add up to what was allocated.

    Args:
        scope: run, phase or oom.
        phase: which phase it was in.
        step: in which denoising step, from 0; None outside one.
        place: what was allocating, in words; empty where not known.
        operation: by which operation.
        request_bytes: what was asked for in vain; 0 but for an OOM, and for one that does not tell.
        note: what is to be said about this moment; mostly nothing.
        live: the largest items, largest first.
    """

    scope: str
    phase: str
    step: int | None
    place: str
    operation: str
    allocated_bytes: int
    named_bytes: int
    unattributed_bytes: int
    weights: Mapping[str, int]
    activation_bytes: int
    request_bytes: int
    note: str
    live: tuple[Item, ...]


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """What a job's attribution pass found.

    Args:
        outcome: of the pass, as of a job.
        reason: why, if it was not ok.
        num_steps: how many denoising steps the pass ran.
        peaks: first the whole run's, then one per phase.
        oom: the moment at which memory ran out, if it did.
    """

    outcome: str
    reason: str
    num_steps: int
    peaks: tuple[Peak, ...]
    oom: Peak | None

    def of_phase(self, phase: str | None) -> Peak | None:
        """Return the peak of a phase; None where the pass did not get there."""
        return next((peak for peak in self.peaks if peak.phase == phase), None)


def read_attribution(path: Path) -> Attribution:
    """Return the content of an attribution.json.

    Raises:
        RecordError: it cannot be read, is of another version, or something is missing; the message names the file.
    """
    values = read_json(path)
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        raise RecordError(
            f"{path}: schema_version={version} is not known; this version of wan_sweep reads {SCHEMA_VERSION}, "
            "so rebuild the report with the version that wrote the file"
        )
    try:
        return Attribution(
            outcome=values["outcome"],
            reason=values["reason"],
            num_steps=values["num_steps"],
            peaks=tuple(_peak(peak) for peak in values["peaks"]),
            oom=_peak(values["oom"]) if values["oom"] else None,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{path} is incomplete: {error} is missing or of another type") from error


def _peak(values: Mapping[str, Any]) -> Peak:
    return Peak(
        scope=values["scope"],
        phase=values["phase"] or "",
        step=values["step"],
        place=_place("", values["block"], values["module"] or ""),
        operation=values["operation"] or "",
        allocated_bytes=values["allocated_bytes"],
        named_bytes=values["named_bytes"],
        unattributed_bytes=values["unattributed_bytes"],
        weights=dict(values["weights"]),
        activation_bytes=values["activation_bytes"],
        request_bytes=values.get("request_bytes") or 0,
        note=values.get("reason") or "",
        live=tuple(_item(item) for item in values["live"]),
    )


def _item(values: Mapping[str, Any]) -> Item:
    return Item(
        num_bytes=values["bytes"],
        count=values["count"],
        kind=values["kind"],
        component=values["component"] or "",
        phase=values["phase"] or "",
        step=values["step"],
        block=values["block"],
        module=values["module"] or "",
        operation=values["operation"] or "",
        shape=None if values["shape"] is None else tuple(values["shape"]),
        dtype=values["dtype"] or "",
        parameter=values["parameter"] or "",
    )


def _place(component: str, block: int | None, module: str) -> str:
    """Return component, block and module as one reads them: "dit block 1's self_attn.q", "vae decoder.head"."""
    if block is None:
        return f"{component} {module}".strip()
    possessive = "'s "
    inside = module.removeprefix(f"blocks.{block}").removeprefix(".")
    return f"{component} block {block}{inside and possessive}{inside}".strip()
