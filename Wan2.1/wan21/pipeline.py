"""From a prompt, and perhaps pictures, to videos; an image is a video of one frame.

Letters: B videos; T, H, W of a video; C, t, h, w of its latents; S prompt tokens; I image tokens; D model width.

Reference: Wan2.1 (arXiv 2503.20314).
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from wan21.assets import Assets
from wan21.clip.model import ImageEncoder
from wan21.clip.preprocess import preprocess
from wan21.components import DTYPES, Component, Components, blocks_to_run
from wan21.conditioning import Condition, frame_mask, frame_pixels, load_pictures, resized
from wan21.control import ControlSources, encode_control, load_control
from wan21.decoding import decode, departures
from wan21.dit.context import Context
from wan21.dit.model import Dit, ForwardPlan
from wan21.dit.opening import Opening
from wan21.dit.tokens import Tokens
from wan21.dit.vace import Control
from wan21.errors import UsageError
from wan21.events import SILENT, Observer, Span
from wan21.guidance import guided, guided_together
from wan21.memory.hosted import HostedResidual
from wan21.memory.slicing import choose_queries, choose_rows
from wan21.models import COMPONENTS, ModelSpec
from wan21.options import Options, keeps_passes_apart, rounds_products
from wan21.parallel.exchange import broadcast
from wan21.parallel.layout import check_layout
from wan21.parallel.opening import OpeningOfPair
from wan21.parallel.tokens import shared_tokens
from wan21.parallel.world import ALONE, World
from wan21.request import Request
from wan21.runtime import Runtime
from wan21.samplers import Sampler, make_sampler
from wan21.shapes import VideoShape
from wan21.text.umt5 import TextEncoder
from wan21.vae import WHOLE, choose_plan
from wan21.vae.vae import Pixels, Vae
from wan21.vae.warm_up import warm_up


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What came out.

    videos: one [T, H, W, 3] per video, uint8, on the host; of several processes the one of rank 0 has them alone.
    latents: [B, C, t, h, w], float32, on the host.
    seeds: of each video's noise.
    """

    videos: list[torch.Tensor]
    latents: torch.Tensor
    seeds: list[int]


class VideoPipeline:
    """The pipeline of all tasks.

    Without offload all components come to the device at the start and stay. With offload each comes when its phase
    begins and leaves when that ends; weights never change, so leaving means being dropped, and nothing is copied back.

    Args:
        spec: the task.
        options: number formats, and where weights and activations live.
        assets: where weights come from, and the tokenizer.
        runtime: where to compute.
        observer: who listens.
        world: this process's place among those that make the videos together.
    """

    def __init__(
        self,
        spec: ModelSpec,
        options: Options,
        assets: Assets,
        runtime: Runtime,
        observer: Observer = SILENT,
        world: World = ALONE,
    ) -> None:
        self._spec = spec
        self._options = options
        self._tokenizer = assets.tokenizer
        self._runtime = runtime
        self._observer = observer
        self._world = world
        if world.layout != options.layout:
            raise UsageError(
                f"options.layout={options.layout} differs from that of the processes, {world.layout}; connect with the "
                "layout of the options"
            )
        self._components = Components(spec, options, assets.weights, runtime, observer, world)
        self._t5: Component[TextEncoder] | None = None
        self._clip: Component[ImageEncoder] | None = None
        self._dit: Component[Dit] | None = None
        self._vae: Component[Vae] | None = None

    @torch.no_grad()
    def generate(self, request: Request) -> Generation:
        """Videos for a request: `batch_size` of them, with the seeds `seed`, `seed` + 1, ...

        Videos share a forward in groups of `micro_batch_size`. All prompts are encoded first and all videos decoded
        last, so that each component is needed once. Of several processes all have to call this, with equal requests.

        Raises:
            UsageError: the request cannot be run in this layout, or within `vae_budget_gib`; nothing has been loaded.
        """
        check_layout(self._options.layout, self._spec, request)
        plan = choose_plan(self._spec, self._options, request.shape.latent)
        if self._options.kernels == "fused":
            warm_up(self._spec.vae, DTYPES[self._options.vae_precision], self._runtime, plan.frames_at_once)
            self._components.warm_up(self._tokens(request))
        pictures, sources = load_pictures(self._spec, request), load_control(self._spec, request)
        encodes = bool(pictures) or sources is not None
        if not self._options.offload:
            with self._phase("load"):
                if self._encodes_text:
                    self._t5 = self._t5 or self._components.t5()
                self._clip = self._clip or (self._components.clip() if pictures else None)
                self._dit = self._dit or self._components.dit()
                self._vae = self._vae or self._components.vae(encodes=encodes)
        texts = [request.prompt] if request.guide_scale == 1 else [request.prompt, request.negative_prompt]
        prompts = self._encode_text(texts)
        condition = self._encode_pictures(pictures, request.shape) if pictures else None
        control = None if sources is None else self._encode_control(sources)
        latents = self._denoise(request, prompts, condition, control)
        # What stands in front of the video shows the references.
        latents = [latent[:, :, request.denoised_shape.latent[0] - request.shape.latent[0] :] for latent in latents]
        videos = self._decode(latents)
        seeds = [request.seed + i for i in range(request.batch_size)]
        return Generation(videos=videos, latents=torch.cat(latents).cpu(), seeds=seeds)

    def close(self) -> None:
        """Drops all components."""
        for name in COMPONENTS:
            if getattr(self, f"_{name}") is not None:
                with self._observer.span(Span(kind="release", name=name)):
                    self._runtime.synchronize()  # a copy into the component's buffers may be on its way
                    setattr(self, f"_{name}", None)
                    if self._options.layout.dit_fsdp or self._options.layout.t5_fsdp:
                        gc.collect()  # torch's FSDP ties modules into circles
                    self._runtime.empty_cache()

    def _phase(self, name: str) -> AbstractContextManager[object]:
        return self._observer.span(Span(kind="phase", name=name))

    @contextmanager
    def _stay(self) -> Iterator[None]:
        """With offload, what came for a phase leaves with it, also when the phase fails.

        So no local name may hold a component inside it: that would keep its bytes beyond the release.
        """
        try:
            yield
        finally:
            if self._options.offload:
                self.close()

    def _encode_text(self, texts: list[str]) -> list[torch.Tensor]:
        """T5's output for each text: [S, text width] on the pipeline's device."""
        with self._stay():
            if self._t5 is None:
                with self._phase("load"):
                    self._t5 = self._components.t5() if self._encodes_text else None
            with self._phase("encode_text"):
                ids = [torch.tensor([self._tokenizer(text)]) for text in texts]
                encoded = self._await_text(ids) if self._t5 is None else self._encode(self._t5, ids)
                if not self._components.t5_is_shared:
                    for prompt in encoded:
                        broadcast(self._world.everyone, prompt)
                return encoded

    @property
    def _encodes_text(self) -> bool:
        """Of several processes the first encodes for all, unless each holds a part of the encoder."""
        return self._world.rank == 0 or self._components.t5_is_shared

    def _encode(self, t5: Component[TextEncoder], ids: list[torch.Tensor]) -> list[torch.Tensor]:
        blocks = blocks_to_run(t5, self._runtime, self._observer)
        encoded = t5.module.encode([prompt.to(t5.device) for prompt in ids], blocks=blocks)
        return [prompt[0].to(self._runtime.device) for prompt in encoded]

    def _await_text(self, ids: list[torch.Tensor]) -> list[torch.Tensor]:
        """Room for what the first process encodes."""
        dtype, device = DTYPES[self._options.t5_precision], self._runtime.device
        return [torch.empty(prompt.shape[1], self._spec.text.dim, dtype=dtype, device=device) for prompt in ids]

    def _encode_pictures(self, pictures: list[torch.Tensor], shape: VideoShape) -> Condition:
        """What CLIP and the VAE make of the pictures; with offload one is gone before the other comes."""
        device = self._runtime.device
        with self._stay():
            if self._clip is None:
                with self._phase("load"):
                    self._clip = self._components.clip()
            with self._phase("encode_image"):
                tokens = self._look(self._clip, pictures)
        with self._stay():
            if self._vae is None:
                with self._phase("load"):
                    self._vae = self._components.vae(encodes=True)
            with self._phase("encode_image"):
                pixels = frame_pixels([resized(picture, shape) for picture in pictures], shape, device)
                size = (1, shape.num_frames, shape.height, shape.width)
                frames = self._encode_pixels(self._vae.module, pixels, size)
                mask = frame_mask(shape, len(pictures)).to(device)
                return Condition(tokens=tokens, latents=torch.cat([mask[None], frames], dim=1))

    def _look(self, clip: Component[ImageEncoder], pictures: list[torch.Tensor]) -> torch.Tensor:
        """CLIP's tokens of pictures, [pictures, I, width]."""
        size = clip.module.config.image_size
        pixels = torch.stack([preprocess(picture, size) for picture in pictures]).to(clip.device)
        return clip.module(pixels, blocks_to_run(clip, self._runtime, self._observer))

    def _encode_control(self, sources: ControlSources) -> torch.Tensor:
        """What the VAE makes of VACE's sources: [1, 96, R + t, h, w], R reference pictures."""
        with self._stay():
            if self._vae is None:
                with self._phase("load"):
                    self._vae = self._components.vae(encodes=True)
            with self._phase("encode_image"):
                # In the format in which the transformer's first layer takes it, step after step.
                return self._control_of(self._vae, sources).to(DTYPES[self._options.precision])

    def _control_of(self, vae: Component[Vae], sources: ControlSources) -> torch.Tensor:
        return encode_control(sources, partial(self._encode_pixels, vae.module), self._runtime.device)

    def _encode_pixels(self, vae: Vae, pixels: Pixels, shape: tuple[int, int, int, int]) -> torch.Tensor:
        """Latents of B, T, H, W pixels, in tiles if there is a budget."""
        if self._options.vae_budget_gib is None:
            return vae.encode_pixels(pixels, shape, self._runtime.as_planned(WHOLE))
        plan = vae.encode_budget(shape).best_plan(int(self._options.vae_budget_gib * 2**30))
        return vae.encode_pixels(pixels, shape, self._runtime.as_planned(plan))

    def _denoise(
        self,
        request: Request,
        prompts: list[torch.Tensor],
        condition: Condition | None,
        control: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """Latents of each video, [1, C, t, h, w], float32, for a prompt and perhaps a negative one."""
        with self._stay():
            if self._dit is None:
                with self._phase("load"):
                    self._dit = self._components.dit()
            with self._phase("denoise"):
                return self._sample(self._dit, request, prompts, condition, control)

    def _sample(
        self,
        dit: Component[Dit],
        request: Request,
        prompts: list[torch.Tensor],
        condition: Condition | None,
        control: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        model, shape = dit.module, request.denoised_shape
        pair = self._world.cfg
        with dit.with_parked():
            contexts = [model.embed_text([prompt]) for prompt in (prompts if pair.size == 1 else [prompts[pair.rank]])]
            if condition is not None:
                contexts = [model.embed_pictures(condition.tokens, context) for context in contexts]
            timesteps = self._sampler(request).timesteps
            times = [model.embed_time(timestep, self._runtime.device).on_host() for timestep in timesteps]
        tokens = self._tokens(request)
        turns = tokens.own(model.rotations(shape.grid, self._runtime.device), 0)
        sizes = (turns.shape[0], self._spec.dit, model.dtype.itemsize)
        plan = ForwardPlan(
            most_queries=choose_queries(self._options.attention_slices, *sizes),
            most_rows=choose_rows(self._options.rows_at_once, *sizes, has_slots=bool(self._options.residual_on_host)),
            tokens=tokens,
            gradient_checkpointing=self._options.gradient_checkpointing,
        )
        groups = [
            range(first, min(first + request.micro_batch_size, request.batch_size))
            for first in range(0, request.batch_size, request.micro_batch_size)
        ]
        total = len(groups) * request.num_steps
        finished: list[torch.Tensor] = []
        for group_index, group in enumerate(groups):
            sampler = self._sampler(request)
            sample = torch.cat([self._noise(request, request.seed + i) for i in group])
            # What outlives a step gets its place before the model takes memory, and is then written to: in the midst of
            # what a forward gives back, it would leave the next one no room for its keys and values.
            sampler.begin(sample)
            given = sample if condition is None else condition.beside(sample)
            context, *negative = (context.expand(len(group)) for context in contexts)
            rows = (len(group), turns.shape[0], plan.most_rows)
            with self._residual(*rows) as residual, self._steering(request, control, *rows) as steering:
                forward = partial(model, turns=turns, plan=plan, residual=residual, control=steering)
                for index, time in enumerate(times):
                    step = group_index * request.num_steps + index
                    with self._observer.span(Span(kind="step", name="step", index=step, total=total)):
                        run = partial(forward, given, time.to(self._runtime.device), opening=self._opening(negative))

                        def velocity(context: Context, run: Callable[..., torch.Tensor] = run) -> torch.Tensor:
                            return run(context, blocks=blocks_to_run(dit, self._runtime, self._observer))

                        if pair.size > 1:
                            flow = guided_together(velocity, context, request.guide_scale, pair)
                        else:
                            flow = guided(velocity, context, negative[0] if negative else None, request.guide_scale)
                        sample.copy_(sampler.step(flow, sample))
                        del flow, velocity, run
                        if condition is not None:
                            given[:, : sample.shape[1]].copy_(sample)
            finished += sample.split(1)
        return finished

    def _tokens(self, request: Request) -> Tokens:
        """The tokens of each video that are here."""
        options = self._options
        num_tokens, is_fused = request.denoised_shape.num_tokens, options.kernels == "fused"
        return shared_tokens(num_tokens, self._world, options.attention_kernel, is_fused=is_fused)

    def _opening(self, negative: list[Context]) -> Opening | None:
        """What both passes of a step share, here or with another process, if they shall and can."""
        options = self._options
        if not options.share_first_attention or keeps_passes_apart(options, self._spec):
            return None
        if self._world.cfg.size > 1:
            return OpeningOfPair(self._world.cfg)
        return Opening() if negative else None

    def _sampler(self, request: Request) -> Sampler:
        return make_sampler(
            request.solver,
            num_steps=request.num_steps,
            shift=request.shift,
            rounds_products=rounds_products(self._spec, self._options, request),
        )

    @contextmanager
    def _residual(self, batch_size: int, num_rows: int, most_rows: int) -> Iterator[HostedResidual | None]:
        """Where the residual is kept if not in one tensor on the device."""
        share = self._options.residual_on_host
        if not share:
            yield None
            return
        residual = HostedResidual((batch_size, num_rows, self._spec.dit.dim), most_rows, share, self._runtime)
        try:
            yield residual
        finally:
            residual.close()

    @contextmanager
    def _steering(
        self, request: Request, control: torch.Tensor | None, batch_size: int, num_rows: int, most_rows: int
    ) -> Iterator[Control | None]:
        """What steers the forwards of a VACE model; its stream is kept where the residual is."""
        if control is None:
            yield None
            return
        with self._residual(batch_size, num_rows, most_rows) as stream:
            yield Control(context=control, scale=request.vace_context_scale, residual=stream)

    def _noise(self, request: Request, seed: int) -> torch.Tensor:
        """[1, C, t, h, w], float32: the first and only draw of a generator on the device."""
        shape = (1, self._spec.dit.out_dim, *request.denoised_shape.latent)
        generator = self._runtime.generator(seed)
        return torch.randn(shape, generator=generator, device=self._runtime.device, dtype=torch.float32)

    def _decode(self, latents: list[torch.Tensor]) -> list[torch.Tensor]:
        """Each video as [T, H, W, 3], uint8, on the host of the first process; frames leave the device as they come."""
        with self._stay():
            if self._vae is None:
                with self._phase("load"):
                    self._vae = self._components.vae(encodes=False)
            with self._phase("decode"):
                return self._frames(self._vae, latents)

    def _frames(self, vae: Component[Vae], latents: list[torch.Tensor]) -> list[torch.Tensor]:
        videos = []
        shape = latents[0].shape
        t, h, w = shape[2:]
        plan = self._runtime.as_planned(choose_plan(self._spec, self._options, (t, h, w)))
        # Around the spans, so that what it pins is seen at their ends.
        with departures(vae.module, shape, plan, self._world, self._runtime) as leaving:
            for index, latent in enumerate(latents):
                with self._observer.span(Span(kind="video", name="video", index=index, total=len(latents))):
                    videos.append(decode(vae.module, latent, plan, self._world, leaving, is_image=self._spec.is_image))
        return [video for video in videos if video is not None]
