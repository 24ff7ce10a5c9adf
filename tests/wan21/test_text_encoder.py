"""The text encoder against transformers' UMT5 (mapping: docs/parity.md), and its own promises."""

import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wan21.models import UMT5_XXL, TextEncoderConfig
from wan21.text.umt5 import Block, TextEncoder, bucket_starts, gelu_tanh, relative_buckets, residual_sum

SMALL = TextEncoderConfig(vocab_size=128, dim=160, ffn_dim=192, num_heads=10, num_layers=4)  # heads: 8 and a rest of 2
LENGTH = 150  # tokens; more than the 128 from where on all distances share a bucket

# The same operations on the same numbers; measured: 0.0. Padding changes the shapes of the products, for which a
# library may choose to add in another order.
FLOAT32_TOLERANCE = 1e-6
# A single token is a product of a matrix and a vector, which is another routine (measured: 1.9e-6 of 3.85).
ONE_TOKEN_TOLERANCE = 3e-6


def random_encoder(dtype: torch.dtype, *, seed: int = 0) -> TextEncoder:
    """Weights of the scale of trained ones: no 1/sqrt(K) in the scores, so q is small; norms differ by channel."""
    encoder = TextEncoder(SMALL, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in encoder.named_parameters():
            fan_in = weight.shape[-1]
            std = 1.0 if "embedding" in name else fan_in**-0.5
            weight.normal_(0, std, generator=generator)
            if "norm" in name:
                weight.mul_(0.3 * fan_in**0.5).add_(1)
            if ".q." in name:
                weight.mul_(SMALL.head_dim**-0.5)
    return encoder.to(dtype).eval()


def random_ids(length: int) -> Tensor:
    return torch.randint(0, SMALL.vocab_size, (1, length), generator=torch.Generator().manual_seed(1))


RENAMES = (
    (r"^token_embedding\.", "shared."),
    (r"^norm\.", "encoder.final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1\.", r"encoder.block.\1.layer.0.layer_norm."),
    (r"^blocks\.(\d+)\.attn\.", r"encoder.block.\1.layer.0.SelfAttention."),
    (r"^blocks\.(\d+)\.pos_embedding\.embedding\.", r"encoder.block.\1.layer.0.SelfAttention.relative_attention_bias."),
    (r"^blocks\.(\d+)\.norm2\.", r"encoder.block.\1.layer.1.layer_norm."),
    (r"^blocks\.(\d+)\.ffn\.gate\.0\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_0."),
    (r"^blocks\.(\d+)\.ffn\.fc1\.", r"encoder.block.\1.layer.1.DenseReluDense.wi_1."),
    (r"^blocks\.(\d+)\.ffn\.fc2\.", r"encoder.block.\1.layer.1.DenseReluDense.wo."),
)


def transformers_name(name: str) -> str:
    for pattern, replacement in RENAMES:
        name, count = re.subn(pattern, replacement, name)
        if count:
            return name
    raise KeyError(name)


def transformers_twin(encoder: TextEncoder, dtype: torch.dtype) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    twin = UMT5EncoderModel(
        UMT5Config(
            vocab_size=SMALL.vocab_size,
            d_model=SMALL.dim,
            d_kv=SMALL.head_dim,
            d_ff=SMALL.ffn_dim,
            num_layers=SMALL.num_layers,
            num_heads=SMALL.num_heads,
            relative_attention_num_buckets=SMALL.num_buckets,
            relative_attention_max_distance=SMALL.max_distance,
            feed_forward_proj="gated-gelu",
            layer_norm_epsilon=SMALL.eps,
            attn_implementation="eager",
        )
    )
    twin = twin.to(dtype).eval()
    state = {transformers_name(name): weight for name, weight in encoder.state_dict().items()}
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    twin.load_state_dict(state)
    return twin


def padded_output(twin: Any, ids: Tensor, length: int) -> Tensor:
    """What the official way gives: pad, mask, encode, cut."""
    num_real = ids.shape[1]
    padded = torch.zeros(1, length, dtype=torch.int64)
    padded[:, :num_real] = ids
    mask = (torch.arange(length) < num_real)[None].long()
    return twin(input_ids=padded, attention_mask=mask).last_hidden_state[:, :num_real]


def test_names_and_shapes_are_those_of_the_checkpoint(checkpoint_shapes: dict[str, Any]) -> None:
    with torch.device("meta"):
        encoder = TextEncoder(UMT5_XXL)
    actual = {name: tuple(weight.shape) for name, weight in encoder.state_dict().items()}
    assert checkpoint_shapes["t5-encoder"] == actual
    assert len(actual) == 242
    assert not list(encoder.buffers())
    assert {torch.bfloat16} == {weight.dtype for weight in encoder.parameters()}


def test_buckets_equal_the_official_ones(golden: dict[str, Any]) -> None:
    first, last = golden["t5_buckets"]["relative_position_key_minus_query"]
    actual = relative_buckets(torch.arange(first, last + 1), num_buckets=32, max_distance=128)
    assert golden["t5_buckets"]["bucket"] == actual.tolist()


def test_distances_beyond_the_table_share_the_last_bucket_of_their_direction() -> None:
    distance = torch.tensor([-511, -128, 128, 511])
    assert relative_buckets(distance, num_buckets=32, max_distance=128).tolist() == [15, 15, 31, 31]


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 64), (32, 1000)])
def test_bucket_starts_equal_the_formula(num_buckets: int, max_distance: int) -> None:
    half, exact = num_buckets // 2, num_buckets // 4

    def bucket(n: int) -> int:
        if n < exact:
            return n
        position = math.log(n / exact) / math.log(max_distance / exact) * (half - exact)
        return min(half - 1, exact + math.floor(position + 1e-9))  # a start may come out a hair below its integer

    expected = [next(n for n in range(max_distance) if bucket(n) >= b) for b in range(1, half)]
    assert expected == bucket_starts(num_buckets, max_distance)


@pytest.mark.parametrize(
    ("length", "tolerance"), [(1, ONE_TOKEN_TOLERANCE), (37, FLOAT32_TOLERANCE), (LENGTH, FLOAT32_TOLERANCE)]
)
@torch.no_grad()
def test_float32_output_equals_that_of_transformers_padded_masked_and_cut(length: int, tolerance: float) -> None:
    encoder = random_encoder(torch.float32)
    ids = random_ids(length)
    expected = padded_output(transformers_twin(encoder, torch.float32), ids, 512)
    torch.testing.assert_close(encoder(ids), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("length", [1, 37, LENGTH])
@torch.no_grad()
def test_float32_output_equals_that_of_transformers_on_the_same_tokens(length: int) -> None:
    encoder = random_encoder(torch.float32)
    ids = random_ids(length)
    expected = padded_output(transformers_twin(encoder, torch.float32), ids, length)
    torch.testing.assert_close(encoder(ids), expected, atol=FLOAT32_TOLERANCE, rtol=0)


@pytest.mark.parametrize("length", [1, 37, LENGTH])
@torch.no_grad()
def test_bfloat16_output_equals_that_of_transformers_with_float32_softmax(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Transformers 5.23 leaves the softmax to the bfloat16 kernel; the official code takes it in float32 and rounds.
    def rounded_softmax(x: Tensor, dim: int) -> Tensor:
        return torch.softmax(x.float(), dim).to(x.dtype)

    encoder = random_encoder(torch.bfloat16)
    twin = transformers_twin(encoder, torch.bfloat16)
    ids = random_ids(length)
    actual = encoder(ids)
    assert actual.dtype == torch.bfloat16
    monkeypatch.setattr(nn.functional, "softmax", rounded_softmax)
    assert torch.equal(twin(input_ids=ids).last_hidden_state, actual)


@torch.no_grad()
def test_bfloat16_output_is_as_near_to_float32_as_that_of_transformers() -> None:
    ids = random_ids(LENGTH)
    encoder = random_encoder(torch.bfloat16)
    theirs = transformers_twin(encoder, torch.bfloat16)(input_ids=ids).last_hidden_state.float()
    ours = encoder(ids).float()
    exact = encoder.float()(ids)
    # Measured relative to the exact norm: 1.0e-2 both, and 7.6e-3 from each other.
    assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()


@torch.no_grad()
def test_prompts_in_one_batch_equal_prompts_one_by_one() -> None:
    encoder = random_encoder(torch.float32)
    ids = random_ids(40).reshape(2, 20)
    expected = torch.cat([encoder(ids[:1]), encoder(ids[1:])])
    torch.testing.assert_close(encoder(ids), expected, atol=FLOAT32_TOLERANCE, rtol=0)


@torch.no_grad()
def test_prompts_that_share_the_visits_of_blocks_give_the_bits_of_prompts_one_by_one() -> None:
    encoder = random_encoder(torch.bfloat16)
    prompts = [random_ids(37), random_ids(12)]
    visits: list[int] = []
    encoder.blocks[0].register_forward_hook(lambda _, args, __: visits.append(len(args)))
    together = encoder.encode(prompts)
    assert visits == [2]
    for ids, encoded in zip(prompts, together, strict=True):
        assert torch.equal(encoder(ids), encoded)


@torch.no_grad()
def test_blocks_brought_by_somebody_else_give_the_same() -> None:
    encoder = random_encoder(torch.bfloat16)
    ids = random_ids(37)
    expected = encoder(ids)
    slot = Block(SMALL, dtype=torch.bfloat16)

    def streamed() -> Any:
        for block in encoder.blocks:
            slot.load_state_dict(block.state_dict())
            yield slot

    assert torch.equal(expected, encoder(ids, blocks=streamed()))
    assert not torch.equal(expected, encoder(ids, blocks=[]))


@torch.no_grad()
def test_a_block_leaves_its_input_as_it_is() -> None:
    block = random_encoder(torch.float32).blocks[0]
    x = torch.randn(1, 9, SMALL.dim, generator=torch.Generator().manual_seed(2))
    before = x.clone()
    block(x, x)
    assert torch.equal(before, x)


@torch.no_grad()
def test_nothing_is_kept_after_a_call() -> None:
    encoder = random_encoder(torch.float32)

    def held() -> set[str]:
        return {
            f"{name}.{key}"
            for name, module in encoder.named_modules()
            for key, value in vars(module).items()
            if isinstance(value, Tensor)
        }

    assert held() == set()
    encoder(random_ids(5))
    assert held() == set()


@torch.no_grad()
def test_gelu_rounds_after_each_operation() -> None:
    x = torch.linspace(-6, 6, 997).bfloat16()
    cube = torch.pow(x, 3.0)
    tanh = torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * cube))
    assert torch.equal(0.5 * x * (1.0 + tanh), gelu_tanh(x.clone()))
    wide = nn.functional.gelu(x.double(), approximate="tanh")
    torch.testing.assert_close(gelu_tanh(x.double()), wide)


def test_float16_sums_stay_finite_and_bfloat16_sums_are_left_alone() -> None:
    x = torch.tensor([60000.0, -60000.0, 1.0])
    assert residual_sum(x.half(), x.half()).tolist() == pytest.approx([64504.0, -64504.0, 2.0], abs=16)
    assert residual_sum(x.bfloat16(), x.bfloat16()).tolist() == pytest.approx([120000.0, -120000.0, 2.0], rel=2**-8)


@torch.no_grad()
def test_float16_output_is_near_that_of_float32() -> None:
    ids = random_ids(37)
    expected = random_encoder(torch.float32)(ids)
    actual = random_encoder(torch.float16)(ids)
    assert actual.dtype == torch.float16
    assert (actual.float() - expected).norm() <= 5e-3 * expected.norm()  # 2**-11 per rounding, a few dozen of them


def test_a_dry_run_on_meta_tensors_gives_the_shape() -> None:
    with torch.device("meta"):
        encoder = TextEncoder(UMT5_XXL)
        output = encoder(torch.zeros(1, 512, dtype=torch.int64))
    assert output.shape == (1, 512, 4096)
