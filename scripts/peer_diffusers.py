"""One run of diffusers' Wan pipeline, from prompt to video, with counters read as for ours.

`bench_peers.py` starts it in a process of its own for each set-up; the last line that it prints is JSON. Weights are
random, of the official sizes, and drawn on the device; nothing is downloaded. What is used of diffusers is public. Not
theirs are: a tokenizer that fills the room for tokens (the text encoder works on all of it anyway, padded), and a VAE
that times its decoding.

What is in the numbers: the text encoder with both prompts, all steps, decoding. What is not: drawing weights, and
turning decoded pixels into frames. Number formats are those of the published checkpoints: bfloat16, with the parts that
diffusers keeps in float32 when it loads them; the VAE as asked for.
"""

import argparse
import json
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from wan21.models import MODELS, ModelSpec, model_spec
from wan21.request import NUM_TRAIN_TIMESTEPS, Request, make_request

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
    from transformers import UMT5EncoderModel

    from wan21.runtime import Runtime

SETUPS = {
    "compiled": "all on the GPU, transformer blocks compiled",
    "group_offload_tiled": "single layers brought ahead of use, on a stream; VAE in blended tiles",
    "gpu": "all on the GPU",
    "model_offload": "a component at a time on the GPU",
    "group_offload": "single layers brought ahead of use, on a stream",
}
DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


class FullTokenizer:
    """Seeded ids for as many tokens as a prompt may have; how long prompts are changes neither memory nor time."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def __call__(self, prompts: list[str], *, max_length: int, **_: object) -> SimpleNamespace:
        """Ids and mask, [prompts, max_length] each."""
        import torch

        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(2, self._vocab_size, (len(prompts), max_length), generator=generator)
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))


@contextmanager
def drawn_on(device: "torch.device", dtype: "torch.dtype") -> "Iterator[None]":
    """Inside it new modules are made on the device, in this format, by their own initialisation."""
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def make_transformer(spec: ModelSpec, device: "torch.device") -> "WanTransformer3DModel":
    """The transformer in bfloat16, with float32 where diffusers keeps it."""
    import torch
    from diffusers import WanTransformer3DModel

    config = spec.dit
    with drawn_on(device, torch.bfloat16):
        model = WanTransformer3DModel(
            num_attention_heads=config.num_heads,
            attention_head_dim=config.head_dim,
            in_channels=config.in_dim,
            out_channels=config.out_dim,
            text_dim=config.text_dim,
            freq_dim=config.freq_dim,
            ffn_dim=config.ffn_dim,
            num_layers=config.num_layers,
            eps=config.eps,
        )
    kept = set(WanTransformer3DModel._keep_in_fp32_modules)  # noqa: SLF001  # what its from_pretrained goes by
    for name, parameter in model.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    return model.eval()


def make_text_encoder(spec: ModelSpec, device: "torch.device") -> "UMT5EncoderModel":
    """UMT5 in bfloat16."""
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    config = spec.text
    with drawn_on(device, torch.bfloat16):
        return UMT5EncoderModel(
            UMT5Config(
                vocab_size=config.vocab_size,
                d_model=config.dim,
                d_kv=config.head_dim,
                d_ff=config.ffn_dim,
                num_layers=config.num_layers,
                num_heads=config.num_heads,
                relative_attention_num_buckets=config.num_buckets,
                relative_attention_max_distance=config.max_distance,
                feed_forward_proj="gated-gelu",
                layer_norm_epsilon=config.eps,
            )
        ).eval()


def make_vae(spec: ModelSpec, precision: str, device: "torch.device", runtime: "Runtime") -> "AutoencoderKLWan":
    """The VAE; `decode_s` of it is what its last decoding took."""
    import torch
    from diffusers import AutoencoderKLWan

    class TimedVae(AutoencoderKLWan):
        decode_s = 0.0

        def decode(self, *arguments: Any, **named: Any) -> Any:  # noqa: ANN401  # as the base class has it
            runtime.synchronize()
            began = time.perf_counter()
            decoded = super().decode(*arguments, **named)
            runtime.synchronize()
            self.decode_s = time.perf_counter() - began
            return decoded

    config = spec.vae
    with drawn_on(device, getattr(torch, DTYPES[precision])):
        return TimedVae(
            base_dim=config.base_dim,
            z_dim=config.z_dim,
            dim_mult=list(config.multipliers),
            num_res_blocks=config.num_res_blocks,
            temperal_downsample=list(config.temporal_downsample),
        ).eval()


def make_pipeline(spec: ModelSpec, setup: str, vae_precision: str, shift: float, runtime: "Runtime") -> "WanPipeline":
    """The pipeline, set up."""
    import torch
    from diffusers import UniPCMultistepScheduler, WanPipeline

    device, stays = runtime.device, setup in {"gpu", "compiled"}
    rest = device if stays else torch.device("cpu")
    pipeline = WanPipeline(
        tokenizer=FullTokenizer(spec.text.vocab_size),
        text_encoder=make_text_encoder(spec, device).to(rest),
        transformer=make_transformer(spec, device).to(rest),
        vae=make_vae(spec, vae_precision, device, runtime).to(rest),
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            num_train_timesteps=NUM_TRAIN_TIMESTEPS,
            flow_shift=shift,
        ),
    )
    pipeline.set_progress_bar_config(disable=True)
    if setup == "compiled":
        pipeline.transformer.compile_repeated_blocks(fullgraph=True)
    elif setup == "model_offload":
        pipeline.enable_model_cpu_offload(device=device)
    elif setup.startswith("group_offload"):
        pipeline.enable_group_offload(
            onload_device=device, offload_type="leaf_level", use_stream=runtime.is_asynchronous
        )
    if setup == "group_offload_tiled":
        pipeline.vae.enable_tiling()
    return pipeline


class StepTimes:
    """Seconds of each step, between two waits for the device; the pipeline calls it at the end of each."""

    def __init__(self, runtime: "Runtime") -> None:
        self.seconds: list[float] = []
        self._runtime = runtime
        self._began = 0.0

    def begin(self) -> None:
        """The first step begins."""
        self._runtime.synchronize()
        self._began = time.perf_counter()

    def __call__(self, _pipeline: object, _index: int, _timestep: object, kept: dict[str, Any]) -> dict[str, Any]:
        """A step has ended; nothing is changed."""
        self._runtime.synchronize()
        now = time.perf_counter()
        self.seconds.append(now - self._began)
        self._began = now
        return kept


def run(pipeline: "WanPipeline", spec: ModelSpec, request: Request, runtime: "Runtime") -> dict[str, Any]:
    """One video; seconds of its parts, and peaks in bytes."""
    import torch

    runtime.empty_cache()
    runtime.reset_memory_peaks()
    began = time.perf_counter()
    with torch.no_grad():
        prompt, negative = pipeline.encode_prompt(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            do_classifier_free_guidance=request.guide_scale > 1,
            max_sequence_length=spec.dit.text_len,
            device=runtime.device,
        )
    runtime.synchronize()
    encode_s = time.perf_counter() - began
    steps = StepTimes(runtime)
    steps.begin()
    pipeline(
        prompt_embeds=prompt,
        negative_prompt_embeds=negative,
        height=request.shape.height,
        width=request.shape.width,
        num_frames=request.shape.num_frames,
        num_inference_steps=request.num_steps,
        guidance_scale=request.guide_scale,
        generator=runtime.generator(request.seed),
        callback_on_step_end=steps,
        output_type="pt",
    )
    memory = runtime.memory()
    return {
        "allocated_bytes": memory.allocated_peak_bytes,
        "reserved_bytes": memory.reserved_peak_bytes,
        "encode_s": encode_s,
        "steps_s": steps.seconds,
        "decode_s": pipeline.vae.decode_s,
    }


def measure(flags: argparse.Namespace) -> dict[str, Any]:
    """The whole of it: what came of the run, and the versions that it ran with."""
    import diffusers
    import transformers

    from wan21.runtime import make_runtime

    spec = model_spec(flags.model)
    request = make_request(
        spec, seed=0, prompt="A video.", size=flags.size, frame_num=flags.frame_num, num_steps=flags.steps
    )
    runtime = make_runtime(flags.device)
    with runtime.counting():
        runtime.warm_up()
        pipeline = make_pipeline(spec, flags.setup, flags.vae_precision, request.shift, runtime)
        measured = run(pipeline, spec, request, runtime)
    versions = {"diffusers": diffusers.__version__, "transformers": transformers.__version__}
    return {"outcome": "ok", "reason": "", **measured, "versions": versions, **runtime.facts()}


def main() -> int:
    """Runs a set-up; out of memory is an answer, too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("setup", choices=tuple(SETUPS))
    parser.add_argument("--model", choices=tuple(MODELS), required=True)
    parser.add_argument("--size", required=True)
    parser.add_argument("--frame-num", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--vae-precision", choices=tuple(DTYPES), required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    flags = parser.parse_args()
    import torch

    try:
        told = measure(flags)
    except torch.OutOfMemoryError as error:
        told = {"outcome": "oom", "reason": str(error).splitlines()[0]}
    print(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
