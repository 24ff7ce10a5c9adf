"""Which models there are: architectures, tasks, and what the official command line uses by default. No torch in here.

Reference: Wan2.1 (arXiv 2503.20314) and the released checkpoints' sizes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from wan21.errors import UsageError, one_of

Task = Literal["t2v", "t2i", "i2v", "flf2v", "vace"]
SAMPLE_FPS = 16
COMPONENTS = ("t5", "clip", "dit", "vae")

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"  # noqa: RUF001
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
NEGATIVE_PROMPT_I2V = "镜头晃动，" + NEGATIVE_PROMPT  # noqa: RUF001
NEGATIVE_PROMPT_FLF2V = "镜头切换，" + NEGATIVE_PROMPT_I2V  # noqa: RUF001


@dataclass(frozen=True, kw_only=True)
class VaceConfig:
    """What VACE adds to the diffusion transformer.

    layers: the main blocks with a block of VACE beside them; the first of all has one.
    in_dim: channels of the context: two videos' latents, and 8 x 8 positions of the mask.

    Raises:
        UsageError: layers do not ascend from 0.

    Reference: VACE (arXiv 2503.07598).
    """

    layers: tuple[int, ...]
    in_dim: int = 96

    def __post_init__(self) -> None:
        if self.layers[:1] != (0,) or list(self.layers) != sorted(set(self.layers)):
            raise UsageError(
                f"vace_layers={list(self.layers)} do not ascend from 0; the released ones are 0, 2, 4, ..."
            )


@dataclass(frozen=True, kw_only=True)
class DitConfig:
    """Sizes of the diffusion transformer.

    in_dim: channels that it takes: those of the latents, and of what is laid beside them (`conditioning_dim`).
    image_dim: width of the image tokens that its cross attention reads besides the prompt; 0: it reads none.
    num_image_positions: image tokens that have a learned position; 0: they have none.
    vace: of the blocks that VACE adds, if it has any.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_dim: int = 16
    out_dim: int = 16
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    eps: float = 1e-6
    image_dim: int = 0
    num_image_positions: int = 0
    vace: VaceConfig | None = None

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise UsageError(f"dim={self.dim} does not split into num_heads={self.num_heads} heads of even width")
        if self.vace is not None and self.vace.layers[-1] >= self.num_layers:
            raise UsageError(
                f"vace_layers={list(self.vace.layers)} name a block that num_layers={self.num_layers} does not have"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head: K."""
        return self.dim // self.num_heads

    @property
    def conditioning_dim(self) -> int:
        """Channels of mask and encoded frames beside the latents."""
        return self.in_dim - self.out_dim


@dataclass(frozen=True, kw_only=True)
class TextEncoderConfig:
    """Sizes of the UMT5 encoder."""

    vocab_size: int
    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    num_buckets: int = 32
    max_distance: int = 128
    text_len: int = 512
    eps: float = 1e-6

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.num_heads


@dataclass(frozen=True, kw_only=True)
class VaeConfig:
    """Sizes of the causal video VAE."""

    base_dim: int = 96
    multipliers: tuple[int, ...] = (1, 2, 4, 4)
    z_dim: int = 16
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Sizes of the CLIP image encoder; `num_layers` counts the last one, too, which is never run.

    text_dim: what its head projects to, which is never run either.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    image_size: int = 224
    patch_size: int = 14
    text_dim: int = 1024
    eps: float = 1e-5

    @property
    def num_tokens(self) -> int:
        """Tokens of a picture: its patches, and one for the whole."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One task: its architecture, and what the official command line uses by default.

    clip: of tasks that look at pictures; None where there is nothing to look at.
    shift_480p: shift of the noise schedule at 480p, where it differs.
    """

    name: str
    task: Task = "t2v"
    dit: DitConfig
    text: TextEncoderConfig
    vae: VaeConfig
    clip: ClipConfig | None = None
    sizes: tuple[str, ...]
    default_size: str
    default_frame_num: int = 81
    default_steps: int = 50
    default_shift: float = 5.0
    shift_480p: float | None = None
    default_guide_scale: float = 5.0
    negative_prompt: str = NEGATIVE_PROMPT

    @property
    def is_image(self) -> bool:
        """Whether it makes one image and no video."""
        return self.task == "t2i"

    def shift_at(self, size: str) -> float:
        """Default shift of the noise schedule for a size."""
        return self.shift_480p if self.shift_480p is not None and size in SIZES_480P else self.default_shift


UMT5_XXL = TextEncoderConfig(vocab_size=256384, dim=4096, ffn_dim=10240, num_heads=64, num_layers=24)
DIT_1_3B = DitConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
DIT_14B = DitConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
DIT_I2V_14B = replace(DIT_14B, in_dim=36, image_dim=1280)
DIT_FLF2V_14B = replace(DIT_I2V_14B, num_image_positions=514)
DIT_VACE_1_3B = replace(DIT_1_3B, vace=VaceConfig(layers=tuple(range(0, 30, 2))))
DIT_VACE_14B = replace(DIT_14B, vace=VaceConfig(layers=tuple(range(0, 40, 5))))
WAN_VAE = VaeConfig()
CLIP_VIT_H = ClipConfig(dim=1280, ffn_dim=5120, num_heads=16, num_layers=32)

SIZES_480P = ("480*832", "832*480")
SIZES_720P = ("720*1280", "1280*720")

# Every part of the real architecture, small: several blocks and heads, all VAE levels, a position bias in every T5
# layer, the same order of sizes (T5 > DiT > VAE), and more tokens of video than of text.
TINY = ModelSpec(
    name="tiny",
    dit=DitConfig(dim=256, ffn_dim=640, num_heads=8, num_layers=4, text_dim=256, text_len=128),
    text=TextEncoderConfig(vocab_size=8192, dim=256, ffn_dim=640, num_heads=8, num_layers=4, text_len=128),
    vae=VaeConfig(base_dim=8),
    sizes=("96*64", "160*96", "256*160"),
    default_size="160*96",
    default_frame_num=9,
    default_steps=4,
)
TINY_CLIP = ClipConfig(dim=64, ffn_dim=128, num_heads=2, num_layers=4, image_size=56, text_dim=32)
TINY_DIT_I2V = replace(TINY.dit, in_dim=36, image_dim=TINY_CLIP.dim)

MODELS: Mapping[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        TINY,
        replace(TINY, name="tiny-t2i", task="t2i", default_frame_num=1),
        replace(
            TINY,
            name="tiny-i2v",
            task="i2v",
            dit=TINY_DIT_I2V,
            clip=TINY_CLIP,
            negative_prompt=NEGATIVE_PROMPT_I2V,
        ),
        replace(
            TINY,
            name="tiny-flf2v",
            task="flf2v",
            dit=replace(TINY_DIT_I2V, num_image_positions=2 * TINY_CLIP.num_tokens),
            clip=TINY_CLIP,
            default_shift=16.0,
            negative_prompt=NEGATIVE_PROMPT_FLF2V,
        ),
        replace(
            TINY,
            name="tiny-vace",
            task="vace",
            dit=replace(TINY.dit, vace=VaceConfig(layers=(0, 2))),
            default_shift=16.0,
        ),
        ModelSpec(name="t2v-1.3B", dit=DIT_1_3B, text=UMT5_XXL, vae=WAN_VAE, sizes=SIZES_480P, default_size="832*480"),
        ModelSpec(
            name="t2v-14B",
            dit=DIT_14B,
            text=UMT5_XXL,
            vae=WAN_VAE,
            sizes=SIZES_720P + SIZES_480P,
            default_size="1280*720",
        ),
        ModelSpec(
            name="t2i-14B",
            task="t2i",
            dit=DIT_14B,
            text=UMT5_XXL,
            vae=WAN_VAE,
            sizes=(*SIZES_720P, *SIZES_480P, "1024*1024"),
            default_size="1024*1024",
            default_frame_num=1,
        ),
        ModelSpec(
            name="i2v-14B",
            task="i2v",
            dit=DIT_I2V_14B,
            text=UMT5_XXL,
            vae=WAN_VAE,
            clip=CLIP_VIT_H,
            sizes=SIZES_720P + SIZES_480P,
            default_size="1280*720",
            default_steps=40,
            shift_480p=3.0,
            negative_prompt=NEGATIVE_PROMPT_I2V,
        ),
        ModelSpec(
            name="flf2v-14B",
            task="flf2v",
            dit=DIT_FLF2V_14B,
            text=UMT5_XXL,
            vae=WAN_VAE,
            clip=CLIP_VIT_H,
            sizes=SIZES_720P + SIZES_480P,
            default_size="1280*720",
            default_shift=16.0,
            negative_prompt=NEGATIVE_PROMPT_FLF2V,
        ),
        ModelSpec(
            name="vace-1.3B",
            task="vace",
            dit=DIT_VACE_1_3B,
            text=UMT5_XXL,
            vae=WAN_VAE,
            sizes=SIZES_480P,
            default_size="832*480",
            default_shift=16.0,
        ),
        ModelSpec(
            name="vace-14B",
            task="vace",
            dit=DIT_VACE_14B,
            text=UMT5_XXL,
            vae=WAN_VAE,
            sizes=SIZES_720P + SIZES_480P,
            default_size="1280*720",
            default_shift=16.0,
        ),
    )
}


def model_spec(name: str) -> ModelSpec:
    """The task of this name.

    Raises:
        UsageError: there is no such task.
    """
    one_of("model", name, tuple(MODELS))
    return MODELS[name]
