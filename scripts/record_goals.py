"""What the presets were to reach, and what the hardware allows: the data behind scripts/record_table.py.

Limits are arithmetic over rates that were measured on the card, so they say how far a figure is from one where every
kernel runs as fast as its kind was ever seen to run there, one after the other and with nothing in between.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

from wan21.models import MODELS, DitConfig
from wan21.shapes import VideoShape, parse_size
from wan_sweep.errors import RecordError
from wan_sweep.report.sheet import PEAK_ALLOCATED, PEAK_RESERVED, STEP_SECONDS, Row, read_sheet
from wan_sweep.units import GIB, format_gib

STATED_FOR = "H100"
"""The card for which the goals were stated and on which the rates of the limits were measured."""

HARDWARE = (STATED_FOR, "H200")
"""The cards that both are applied to: an H200 has the same processor (132 SMs) and faster memory, which helps only what
is bound by memory. On another card the table has neither."""

PRODUCT_RATE = 790e12
"""Operations a second of a large bfloat16 product, measured on an H100 (2026-11-23)."""

ATTENTION_RATES = {
    ("cudnn", 32_760): 613e12,
    ("cudnn", 75_600): 566e12,
    ("flash", 32_760): 366e12,
    ("flash", 75_600): 352e12,
    ("fa3", 32_760): 739e12,
    ("fa3", 75_600): 678e12,
}
"""The highest that each kernel reached there at these numbers of tokens, 128 wide heads (2026-11-23 and -24)."""

CHOSEN_BY_TORCH = "cudnn"
"""What attention_kernel=sdpa becomes on that card."""

CONVOLUTION_RATES = {"bf16": 513e12, "fp32": 209e12}
"""The highest that cuDNN's 3-D convolutions reached there, channels last; in float32 with TF32 (2026-11-23)."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One configuration of one sweep.

    preset: its name; empty if the sweep had only one, which then stands in no record, and is not named after it.
    """

    row: Row
    preset: str

    def knob(self, name: str) -> object:
        """A knob's value."""
        return self.row.knobs.get(name)

    @property
    def label(self) -> str:
        """The preset, and what makes it another one."""
        share = float(str(self.knob("residual_on_host") or 0))
        return f"{self.preset}, residual_on_host={share:g}" if share else self.preset

    @property
    def workload(self) -> str:
        """Model and size."""
        return f"{self.knob('model')} {self.knob('size')}"

    @property
    def vae(self) -> str:
        """Format of the VAE."""
        return str(self.knob("vae_precision"))

    @property
    def attention(self) -> str:
        """Kernel of self attention."""
        name = str(self.knob("attention_kernel"))
        return CHOSEN_BY_TORCH if name == "sdpa" and self.is_on_hardware else name

    @property
    def allocator(self) -> str:
        """Settings of torch's allocator."""
        return self.row.records[0].environment.get("allocator", "default")

    @property
    def has_limits(self) -> bool:
        """Whether it ran on the card, and in the format, that limits and goals are known for."""
        return self.is_on_hardware and self.knob("precision") == "bf16"

    @property
    def is_on_hardware(self) -> bool:
        """Whether it ran on the card that limits and goals are for."""
        return any(card in self.gpu for card in HARDWARE)

    @property
    def gpu(self) -> str:
        """What the driver calls the card."""
        return self.row.records[0].environment.get("gpu", "")

    @property
    def is_approximate(self) -> bool:
        """Whether it multiplies or stores in eight bits."""
        return self.knob("linear_format") not in {None, "same"} or self.knob("attention_kernel") == "fa3_fp8"

    @property
    def is_compared_with_plain(self) -> bool:
        """Whether its output was compared with that of the plain run."""
        fidelity = self.row.records[0].fidelity or {}
        return "optimization=none" in str(fidelity.get("reference", ""))

    @property
    def forward_s(self) -> float | None:
        """Seconds of one forward: the median step, divided by its passes."""
        step = self.row.value(STEP_SECONDS)
        return None if step is None else step / (1 if self.knob("sample_guide_scale") == 1 else 2)

    def value(self, metric: str) -> float | None:
        """A metric, in bytes or seconds."""
        return self.row.value(metric)


def read_lines(folders: Iterable[Path]) -> list[Line]:
    """The configurations of all sweeps, in their order.

    Raises:
        RecordError: a folder holds no records, or one cannot be read.
    """
    lines = []
    for folder in folders:
        sheet = read_sheet(folder)
        if sheet.damaged or not sheet.rows:
            raise RecordError("; ".join(sheet.damaged) or f"{folder} holds no records; name the folder of a sweep")
        lines += [Line(row=row, preset=_preset(row)) for row in sheet.rows]
    return lines


def _preset(row: Row) -> str:
    """What the sweep varied; or the preset that the whole sweep is named after."""
    name = row.records[0].sweep_name
    return row.axes.get("optimization", name if name in _presets() else "")


@cache
def _presets() -> frozenset[str]:
    folder = Path(__file__).resolve().parents[1] / "conf/optimization"
    return frozenset(path.stem for path in folder.glob("*.yaml"))


def shape_of(line: Line) -> VideoShape:
    """Frames, height and width of what it generates."""
    width, height = parse_size(str(line.knob("size")))
    return VideoShape(num_frames=int(str(line.knob("frame_num"))), height=height, width=width)


def forward_work(config: DitConfig, num_tokens: int) -> tuple[int, int]:
    """Operations of one forward, without what text, time and single tokens take: attention's, and the products'.

    Args:
        config: D wide, M in the feed-forward's hidden layer; S prompt tokens.
        num_tokens: L.

    Returns:
        4 L (L + S) D for each block; 2 (6 D^2 + 2 D M) L for each block.
    """
    dim, blocks = config.dim, config.num_layers
    attention = 4 * num_tokens * (num_tokens + config.text_len) * dim
    products = 2 * (6 * dim * dim + 2 * dim * config.ffn_dim) * num_tokens
    return blocks * attention, blocks * products


def forward_limit(line: Line) -> float | None:
    """Seconds of a forward if all kernels ran at the highest rates seen; None where these are not known."""
    num_tokens = shape_of(line).num_tokens
    rate = ATTENTION_RATES.get((line.attention, num_tokens))
    if rate is None or not line.has_limits:
        return None
    attention, products = forward_work(MODELS[str(line.knob("model"))].dit, num_tokens)
    return attention / rate + products / PRODUCT_RATE


def decode_limit(line: Line) -> float | None:
    """Seconds of decoding whole frames if all convolutions ran at cuDNN's highest rate; None where it is not known."""
    rate = CONVOLUTION_RATES.get(line.vae)
    if rate is None or not line.has_limits:
        return None
    return 2 * _decode_macs(str(line.knob("model")), shape_of(line).latent) / rate


@cache
def _decode_macs(model: str, latent_shape: tuple[int, int, int]) -> float:
    """Multiply-adds of decoding, counted over the decoder's layers."""
    import torch

    from wan21.vae import WHOLE, Budget
    from wan21.vae.vae import Vae

    with torch.device("meta"):
        decoder = Vae(MODELS[model].vae, dtype=torch.float32).decoder
    return latent_shape[0] * Budget(decoder, latent_shape, itemsize=4).work(WHOLE)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A column with a goal: its title, where it is read, how it is shown."""

    title: str
    read: Callable[[Line], float | None]
    show: Callable[[float], str]


def _metric(name: str) -> Callable[[Line], float | None]:
    return lambda line: line.value(name)


def _seconds(value: float) -> str:
    return f"{value:.3f}"


def _times(value: float) -> str:
    return f"{value:.2f}"


ALLOCATED = Figure(title="peak allocated GiB", read=_metric(PEAK_ALLOCATED), show=format_gib)
RESERVED = Figure(title="peak reserved GiB", read=_metric(PEAK_RESERVED), show=format_gib)
FORWARD = Figure(title="forward s", read=lambda line: line.forward_s, show=_seconds)
DECODE = Figure(title="decode s", read=_metric("time/decode_s"), show=_seconds)
T5_PEAK = Figure(title="T5 peak GiB", read=_metric("memory/peak/encode_text/allocated_bytes"), show=format_gib)
T5_SECONDS = Figure(title="T5 s", read=_metric("time/encode_text_s"), show=_seconds)
LATENTS = Figure(
    title="latents relative L2",
    read=lambda line: line.value("fidelity/latents_relative_l2") if line.is_compared_with_plain else None,
    show="{:.2e}".format,
)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a figure of a preset was to be.

    at_most: bytes, seconds or a plain number; with `is_ratio` times the shortest of the same workload.
    attention: with this kernel only; None: with any.
    vae: with this format of the VAE only; None: with any.
    """

    preset: str
    workload: str
    figure: Figure
    at_most: float
    is_ratio: bool = False
    attention: str | None = None
    vae: str | None = None

    def applies_to(self, line: Line) -> bool:
        """Whether this configuration was to reach it."""
        return (
            line.has_limits
            and line.knob("frame_num") == NUM_FRAMES
            and line.preset == self.preset
            and line.workload == self.workload
            and self.attention in {None, line.attention}
            and self.vae in {None, line.vae}
        )


NUM_FRAMES = 81
SMALL, MIDDLE, LARGE = "t2v-1.3B 832*480", "t2v-14B 832*480", "t2v-14B 1280*720"


def _lowest(workload: str, allocated: float, reserved: float) -> list[Goal]:
    def goal(figure: Figure, at_most: float, *, is_ratio: bool = False) -> Goal:
        return Goal(preset="lowest_memory", workload=workload, figure=figure, at_most=at_most, is_ratio=is_ratio)

    return [
        goal(ALLOCATED, allocated * GIB),
        goal(RESERVED, reserved * GIB),
        goal(FORWARD, 1.05, is_ratio=True),
        goal(DECODE, 1.4, is_ratio=True),
        goal(T5_PEAK, 0.8 * GIB),
        goal(T5_SECONDS, 0.8),
        goal(LATENTS, 2e-3),
    ]


def _fastest(workload: str, *, cudnn: float, fa3: float, fp32: float, bf16: float) -> list[Goal]:
    def goal(figure: Figure, at_most: float, *, attention: str | None = None, vae: str | None = None) -> Goal:
        return Goal(preset="fastest", workload=workload, figure=figure, at_most=at_most, attention=attention, vae=vae)

    return [
        goal(FORWARD, cudnn, attention="cudnn"),
        goal(FORWARD, fa3, attention="fa3"),
        goal(DECODE, fp32, vae="fp32"),
        goal(DECODE, bf16, vae="bf16"),
        goal(LATENTS, 2e-3),
    ]


GOALS = (
    *_lowest(SMALL, 1.0, 1.3),
    *_lowest(MIDDLE, 2.0, 2.5),
    *_lowest(LARGE, 4.0, 4.6),
    *_fastest(SMALL, cudnn=0.48, fa3=0.43, fp32=2.0, bf16=1.2),
    *_fastest(LARGE, cudnn=11.1, fa3=9.9, fp32=4.6, bf16=2.8),
    Goal(preset="fastest_fp8", workload=LARGE, figure=FORWARD, at_most=8.0),
)
"""Set on 2026-11-23 for one H100, 81 frames, bfloat16 and exact attention, from the best that was measured on it side
by side: less than half of the least memory (2.49 GiB for the smallest workload, 8.56 for the largest: diffusers with
group offload and tiles), and a forward that is shorter than the shortest (0.535 and 11.3 s: diffusers with compiled
blocks)."""


def least(figure: Figure, line: Line, lines: Sequence[Line]) -> float | None:
    """The shortest of this figure among exact configurations: same workload and card, and to decode, VAE format.

    None where only this configuration was measured: nothing is gained by comparing it with itself.
    """
    same = [
        (other, value)
        for other in lines
        if (other.workload, other.gpu) == (line.workload, line.gpu)
        and not other.is_approximate
        and (figure is not DECODE or other.vae == line.vae)
        and (value := figure.read(other)) is not None
    ]
    return min(value for _, value in same) if any(other is not line for other, _ in same) else None


def ratio(figure: Figure, line: Line, lines: Sequence[Line]) -> float | None:
    """How many times the shortest exact one it takes."""
    value, shortest = figure.read(line), least(figure, line, lines)
    return value / shortest if value is not None and shortest else None


def neighbours(lines: Sequence[Line]) -> int:
    """How many of the measured jobs ran while another one ran on the same host, on another GPU."""
    spans = [
        (
            record.environment.get("host", ""),
            datetime.fromisoformat(record.started_at),
            datetime.fromisoformat(record.ended_at),
        )
        for line in lines
        for record in line.row.measured
        if record.measured_in is None
    ]
    return sum(
        any(one is not other and one[0] == other[0] and one[1] < other[2] and other[1] < one[2] for other in spans)
        for one in spans
    )
