"""Fused operations carry out the same transformer: on a CPU through the operators' references."""

from collections.abc import Iterator

import pytest
import torch

from tests.wan21.test_dit import SMALL, inputs, realistic_
from wan21.dit.model import Dit, ForwardPlan
from wan21.dit.operations import FusedOperations, Operations
from wan21.errors import UsageError
from wan21.kernels import tokens
from wan21.options import Options, check_device


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def make(operations: Operations, dtype: torch.dtype) -> Dit:
    model = Dit(SMALL, dtype=dtype, operations=operations)
    realistic_(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("plan", [ForwardPlan(), ForwardPlan(most_queries=24, most_rows=64)])
def test_a_fused_forward_is_put_together_as_the_plain_one(plan: ForwardPlan, batch: int, dtype: torch.dtype) -> None:
    latents, prompts = inputs(batch)
    prompts = [prompt.repeat(31, 1)[: SMALL.text_len] for prompt in prompts]  # without padding, which is counted
    plain, fused = make(Operations(), dtype), make(FusedOperations(), dtype)
    expected = plain(latents, 700, plain.embed_text(prompts), plan=plan)
    assert torch.equal(fused(latents, 700, fused.embed_text(prompts), plan=plan), expected)


def test_heads_are_written_over_their_input() -> None:
    x = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(0))
    weight, turns = torch.ones(8), torch.polar(torch.ones(5, 1, 2), torch.full((5, 1, 2), 0.5))
    elsewhere = torch.empty(1, 5, 2, 4)
    tokens.rms_heads_(x.clone(), weight, turns, 1e-6, elsewhere)
    tokens.rms_heads_(x, weight, turns, 1e-6, x.unflatten(-1, (2, 4)))
    assert torch.equal(x.unflatten(-1, (2, 4)), elsewhere)


def test_operators_have_shapes_without_data() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, one = torch.empty(2, 3, 8), torch.empty(1, 1, 8)
        out = tokens.modulate(x, one, one, 1e-6, torch.bfloat16, torch.float32)
        tokens.add_gated_(x, out, one)
        tokens.rms_heads_(out, torch.empty(8), None, 1e-6, torch.empty(2, 3, 2, 4))
        attended = tokens.attend_counted(torch.empty(2, 5, 2, 4), *torch.empty(2, 2, 3, 2, 4), 7)
        hidden = tokens.linear_gelu(out[0], torch.empty(16, 8, dtype=out.dtype), torch.empty(16, dtype=out.dtype))
    assert (out.shape, out.dtype) == ((2, 3, 8), torch.bfloat16)
    assert (attended.shape, attended.dtype) == ((2, 5, 8), torch.float32)
    assert (hidden.shape, hidden.dtype) == ((3, 16), torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "device", "words"),
    [
        (Options(kernels="fused"), "cpu", "kernels=fused runs on an NVIDIA GPU, not on device=cpu"),
        (Options(attention_kernel="cudnn"), "cpu", "attention_kernel=cudnn runs on an NVIDIA GPU"),
        (Options(attention_kernel="flash", precision="fp32"), "cuda", "precision=fp32; choose attention_kernel=sdpa"),
        (Options(attention_kernel="fa3", precision="fp16"), "cuda", "or precision=bf16"),
    ],
)
def test_kernels_that_cannot_run_are_refused_by_name(options: Options, device: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        check_device(options, device)
