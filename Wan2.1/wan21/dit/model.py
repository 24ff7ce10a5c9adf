"""The diffusion transformer: latents, timestep and prompt to a velocity.

Letters: B videos, C channels, t, h, w of the latents, L tokens (t * h/2 * w/2), S prompt tokens, I image tokens,
D model width, K head width.

Reference: Wan2.1 (arXiv 2503.20314), section 4.2; flow matching (arXiv 2210.02747).
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch.utils.checkpoint import checkpoint

from wan21.dit.block import Block
from wan21.dit.context import Context
from wan21.dit.image import ImageEmbedding
from wan21.dit.layers import Slicing, chunk_rows
from wan21.dit.opening import Opening
from wan21.dit.operations import Modulation, Operations
from wan21.dit.residual import Outs, Residual, Windowed, collect, pairs, windows
from wan21.dit.vace import Control, VaceBlock
from wan21.models import DitConfig
from wan21.rope import rotations
from wan21.shapes import PATCH


@dataclass(frozen=True, kw_only=True)
class ForwardPlan(Slicing):
    """How one forward is carried out; none of it changes what is computed.

    gradient_checkpointing: with gradients kept, save each block's input only and compute the rest again.
    """

    gradient_checkpointing: bool = False


WHOLE = ForwardPlan()


@dataclass(frozen=True)
class Time:
    """What the network makes of a timestep; float32.

    embedding: [1, D].
    modulations: its projection, [1, 6, D].
    """

    embedding: torch.Tensor
    modulations: torch.Tensor

    def to(self, device: torch.device) -> "Time":
        """The same there; a copy from the host does not wait."""
        return Time(self.embedding.to(device, non_blocking=True), self.modulations.to(device, non_blocking=True))

    def on_host(self) -> "Time":
        """The same on the host, arrived."""
        return Time(self.embedding.cpu(), self.modulations.cpu())


class Head(nn.Module):
    """Residual to patches of velocity, in float32."""

    def __init__(self, config: DitConfig, operations: Operations) -> None:
        super().__init__()
        self.eps = config.eps
        self.operations = operations
        self.head = nn.Linear(config.dim, PATCH * PATCH * config.out_dim, dtype=torch.float32)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim, dtype=torch.float32))

    def forward(self, residual: Residual, time: torch.Tensor, size: int) -> torch.Tensor:
        """[B, L, D] and the timestep's embedding [B or 1, D] to [B, L, 64]; all float32, `size` rows at a time."""
        shift, scale = (self.modulation + time.unsqueeze(1)).split(1, dim=1)
        modulation = Modulation(shift, 1 + scale)

        def patches(_: slice, window: torch.Tensor, outs: Outs) -> Iterator[torch.Tensor]:
            x = self.operations.modulated(window, modulation, self.eps, torch.float32)
            yield self.operations.linear(self.head, x, outs[0])

        shape = (*residual.shape[:2], self.head.out_features)
        whole = None if torch.is_grad_enabled() else time.new_empty(shape)
        return collect(windows(residual, size), patches, (whole,))[0]


class Dit(nn.Module):
    """The transformer of all tasks.

    Args:
        config: sizes.
        dtype: of linear layers and attention. Time embedding, modulation, norms and the head are float32 always.
        operations: how what lies between the products is carried out; torch's own operators if not given.

    Build it on the meta device and let `wan21.weights` fill it.

    ONCE: submodules that a run needs before its first step only.
    """

    ONCE: ClassVar[tuple[str, ...]] = ("text_embedding", "img_emb", "time_embedding", "time_projection")

    def __init__(self, config: DitConfig, *, dtype: torch.dtype, operations: Operations | None = None) -> None:
        super().__init__()
        dim = config.dim
        operations = operations or Operations()
        self.config = config
        self.dtype = dtype
        self._counts_padding = operations.COUNTS_PADDING
        # A convolution whose stride is its kernel: run as a linear layer over patches, kept in the checkpoint's shape.
        self.patch_embedding = nn.Conv3d(config.in_dim, dim, (1, PATCH, PATCH), (1, PATCH, PATCH), dtype=dtype)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim, dtype=dtype),
            nn.GELU(approximate="tanh"),
            nn.Linear(dim, dim, dtype=dtype),
        )
        if config.image_dim:
            self.img_emb = ImageEmbedding(config, dtype)
        self.time_embedding = nn.Sequential(
            nn.Linear(config.freq_dim, dim, dtype=torch.float32), nn.SiLU(), nn.Linear(dim, dim, dtype=torch.float32)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim, dtype=torch.float32))
        self.blocks = nn.ModuleList(Block(config, dtype, operations) for _ in range(config.num_layers))
        if config.vace is not None:
            patch = (1, PATCH, PATCH)
            self.vace_patch_embedding = nn.Conv3d(config.vace.in_dim, dim, patch, patch, dtype=dtype)
            self.vace_blocks = nn.ModuleList(
                VaceBlock(config, dtype, operations, is_first=layer == 0) for layer in config.vace.layers
            )
        self.head = Head(config, operations)

    def sequence(self) -> dict[str, nn.Module]:
        """All blocks by name, in the order in which a forward runs them: each of VACE behind the one it steers."""
        beside = {} if self.config.vace is None else {layer: n for n, layer in enumerate(self.config.vace.layers)}
        named: dict[str, nn.Module] = {}
        for index, block in enumerate(self.blocks):
            named[f"blocks.{index}"] = block
            if index in beside:
                named[f"vace_blocks.{beside[index]}"] = self.vace_blocks[beside[index]]
        return named

    def embed_text(self, prompts: Sequence[torch.Tensor]) -> Context:
        """The context that cross attention reads; the same in every step, so compute it once.

        Rows of padding are those of a zero input, not zeros. Where operations can count, and all prompts are as long,
        there is one of them.

        Args:
            prompts: one [n, text_dim] of T5's output per video, n at most text_len.
        """
        lengths, text_len = {prompt.shape[0] for prompt in prompts}, self.config.text_len
        num_rows = min(text_len, max(lengths) + 1) if self._counts_padding and len(lengths) == 1 else text_len
        padded = torch.stack(
            [F.pad(prompt.to(self.dtype), (0, 0, 0, num_rows - prompt.shape[0])) for prompt in prompts]
        )
        return Context(self.text_embedding(padded), repeats=1 + text_len - num_rows)

    def embed_pictures(self, tokens: torch.Tensor, context: Context) -> Context:
        """The context of a task that looks at pictures, from the prompt's.

        Args:
            tokens: of CLIP, [pictures, I / pictures, image_dim], of all videos.
            context: from `embed_text`.
        """
        return context._replace(pictures=self.img_emb(tokens).expand(context.text.shape[0], -1, -1))

    def embed_time(self, timestep: float, device: torch.device) -> Time:
        """What the network makes of a timestep; the same in every pass of a step."""
        half = self.config.freq_dim // 2
        exponent = torch.arange(half, dtype=torch.float64, device=device) / half
        angles = timestep * 10000.0**-exponent
        sinusoid = torch.cat([angles.cos(), angles.sin()]).float().unsqueeze(0)
        embedding = self.time_embedding(sinusoid)
        return Time(embedding, self.time_projection(embedding).unflatten(1, (6, -1)))

    def rotations(self, grid: tuple[int, int, int], device: torch.device) -> torch.Tensor:
        """Rotary positions for a grid of tokens: [L, 1, K/2], complex64. The same in every step."""
        return rotations(grid, self.config.head_dim, device)

    def forward(
        self,
        latents: torch.Tensor,
        time: float | Time,
        context: Context,
        *,
        turns: torch.Tensor | None = None,
        blocks: Iterable[nn.Module] | None = None,
        plan: ForwardPlan = WHOLE,
        residual: Windowed | None = None,
        control: Control | None = None,
        opening: Opening | None = None,
    ) -> torch.Tensor:
        """The velocity of the flow.

        Args:
            latents: [B, in_dim, t, h, w], float32; beside the noisy latents, what they are conditioned on.
            time: the timestep of all videos, 0 to 1000, or what `embed_time` made of it.
            context: from `embed_text` or `embed_pictures`.
            turns: from `rotations`, those of the plan's tokens; computed here if not given.
            blocks: what to run in place of those of `sequence`, in their order; for those who listen to them.
            plan: how to carry it out.
            residual: where the residual [B, L, D] of the plan's tokens shall be kept; None: in a tensor on the device.
            control: what steers the forward; VACE's models need it, and no others take it.
            opening: shared with another forward that differs in its context only; not with a control, nor with a
                residual that is kept elsewhere.

        Returns:
            [B, C, t, h, w], all tokens, float32, rounded to the compute dtype as upstream does (docs/parity.md).

        Raises:
            ValueError: there is a control and the model has no blocks for it, or the other way round; an opening
                where none can be.

        Memory: the residual [B, L, D] in float32, the control stream of the same size if there is one, keys and values
        [2, B, L, D] in the compute dtype, which all blocks share unless gradients are kept, and what a block needs.
        """
        if (control is None) != (self.config.vace is None):
            raise ValueError(
                "control is what VACE's models need and no others take; "
                f"this one has vace={self.config.vace} and control is {'absent' if control is None else 'given'}"
            )
        if opening is not None and (control is not None or residual is not None or torch.is_grad_enabled()):
            raise ValueError("opening: needs the residual in a tensor on the device, no control, and no gradients")
        t, h, w = latents.shape[2:]
        grid = (t, h // PATCH, w // PATCH)
        if turns is None:
            turns = plan.tokens.own(self.rotations(grid, latents.device), 0)
        if not isinstance(time, Time):
            time = self.embed_time(time, latents.device)
        begun = None if opening is None else opening.take()
        x = self._patchify(latents, grid, plan, residual) if begun is None else begun
        del begun
        steering = None if control is None else self._begin_control(control, x, grid, plan)
        shape = (x.shape[0], x.shape[1], self.config.num_heads, self.config.head_dim)
        like = latents.new_empty(0, dtype=self.dtype)
        room = None if torch.is_grad_enabled() else plan.tokens.room(2, shape, like)
        # Upstream's residual is in the compute dtype until the first addition; its values are the same in float32, but
        # the first norm's output is rounded to it.
        norm_dtype = self.dtype
        sequence = self.sequence()
        # The blocks first: they may surround each with a span, which ends when the next one is asked for.
        for block, own in zip(sequence.values() if blocks is None else blocks, sequence.values(), strict=True):
            shared = (time.modulations, context, turns, plan)
            if control is not None and steering is not None and isinstance(own, VaceBlock):
                x, steering = self._run(block, plan, (x, steering), *shared, control.scale, room)
            else:
                x = self._run(block, plan, x, *shared, norm_dtype, room, opening)
                norm_dtype, opening = torch.float32, None
        # The velocity gets its place while keys and values have theirs, or it would leave the next forward's no room.
        # The head's rows are in float32, so half as many take as much as those of a block.
        patches = self.head(x, time.embedding, -(-chunk_rows(x.shape, plan.most_rows) // 2)).to(self.dtype)
        return self._unpatchify(plan.tokens.whole(patches), grid)

    def _run(self, block: nn.Module, plan: ForwardPlan, *args: Any) -> Any:  # noqa: ANN401 # a block's own
        """What the block makes of its arguments; with gradients kept perhaps in a way that keeps less."""
        if plan.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def _patchify(
        self, latents: torch.Tensor, grid: tuple[int, int, int], plan: ForwardPlan, residual: Windowed | None
    ) -> Residual:
        patches = self._patches(latents, grid, plan)
        weight, bias = self.patch_embedding.weight.flatten(1), self.patch_embedding.bias
        if torch.is_grad_enabled():
            return F.linear(patches, weight, bias).float()
        shape = torch.Size((*patches.shape[:2], self.config.dim))
        x = torch.empty(shape, dtype=torch.float32, device=latents.device) if residual is None else residual
        for rows, window in windows(x, chunk_rows(shape, plan.most_rows), reads=False, writes=True):
            window.copy_(F.linear(patches[:, rows], weight, bias))
        return x

    def _patches(self, latents: torch.Tensor, grid: tuple[int, int, int], plan: ForwardPlan) -> torch.Tensor:
        """The latents of the plan's tokens, ordered as a patch embedding's weight.

        Returns:
            [B, L, C * 4] in the compute dtype; copies.
        """
        (b, c), (t, h, w) = latents.shape[:2], grid
        patches = latents.to(self.dtype).view(b, c, t, h, PATCH, w, PATCH).permute(0, 2, 3, 5, 1, 4, 6)
        return plan.tokens.own(patches.reshape(b, t * h * w, c * PATCH * PATCH), 1)

    def _begin_control(self, control: Control, x: Residual, grid: tuple[int, int, int], plan: ForwardPlan) -> Residual:
        """The control stream, [B, L, D] in float32, before its first block; x is the main one before its first."""
        patches = self._patches(control.context, grid, plan)
        weight, bias = self.vace_patch_embedding.weight.flatten(1), self.vace_patch_embedding.bias
        first = cast("VaceBlock", self.vace_blocks[0])
        if torch.is_grad_enabled():
            return first.begin(F.linear(patches, weight, bias), cast("torch.Tensor", x)).float()
        size = chunk_rows(x.shape, plan.most_rows)
        stream = control.residual
        steering = torch.empty(x.shape, dtype=torch.float32, device=patches.device) if stream is None else stream
        for (rows, window), (_, own) in pairs(steering, x, size, reads=False):
            window.copy_(first.begin(F.linear(patches[:, rows], weight, bias), own))
        return steering

    def _unpatchify(self, patches: torch.Tensor, grid: tuple[int, int, int]) -> torch.Tensor:
        t, h, w = grid
        patches = patches.view(-1, t, h, w, PATCH, PATCH, self.config.out_dim)
        shape = (patches.shape[0], self.config.out_dim, t, h * PATCH, w * PATCH)
        video = torch.empty(shape, dtype=torch.float32, device=patches.device)
        video.view(*shape[:3], h, PATCH, w, PATCH).permute(0, 2, 3, 5, 4, 6, 1).copy_(patches)
        return video
