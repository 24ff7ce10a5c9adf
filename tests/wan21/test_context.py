"""One token of a prompt's padding says as much as all of them, if it counts as often."""

import math
from collections.abc import Iterator

import pytest
import torch

from tests.wan21.test_dit import SMALL, inputs, realistic_, relative_l2
from tests.wan21.test_dit_image import I2V, pictures_of
from wan21.dit.model import Dit
from wan21.dit.operations import FusedOperations, Operations
from wan21.kernels import tokens

SAME_ROUNDING = 3e-6  # in float32; the same sums, those of equal addends by a factor


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("repeats", [1, 2, 495])
def test_a_key_that_counts_often_equals_as_many_keys(repeats: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 3, 16, generator=generator) for n in (37, 18, 18))
    keys, values = (torch.cat([x, x[:, -1:].expand(-1, repeats - 1, -1, -1)], dim=1).double() for x in (k, v))
    scores = torch.einsum("blnk,bsnk->bnls", q.double(), keys) / math.sqrt(16)
    expected = torch.einsum("bnls,bsnk->blnk", scores.softmax(-1), values).flatten(2).float()
    assert relative_l2(tokens.attend_counted(q, k, v, repeats), expected) < SAME_ROUNDING


@pytest.mark.parametrize("lengths", [(17, 17), (17, 18), (511,), (512,)])
def test_counted_padding_gives_the_forward_that_all_of_it_gives(lengths: tuple[int, ...]) -> None:
    latents, _ = inputs(len(lengths))
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randn(length, SMALL.text_dim, generator=generator) for length in lengths]
    plain, fused = (Dit(SMALL, dtype=torch.float32, operations=one()) for one in (Operations, FusedOperations))
    realistic_(plain)
    realistic_(fused)
    context = fused.embed_text(prompts)
    is_counted = len(set(lengths)) == 1
    assert context.text.shape[1] + context.repeats - 1 == SMALL.text_len
    assert context.text.shape[1] == (min(lengths[0] + 1, SMALL.text_len) if is_counted else SMALL.text_len)
    expected = plain(latents, 700, plain.embed_text(prompts))
    assert relative_l2(fused(latents, 700, context), expected) < SAME_ROUNDING


def test_pictures_are_read_beside_counted_padding() -> None:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(1, I2V.in_dim, 3, 8, 12, generator=generator)
    prompt = torch.randn(17, I2V.text_dim, generator=generator)
    velocities = []
    for operations in (Operations(), FusedOperations()):
        model = Dit(I2V, dtype=torch.float32, operations=operations)
        realistic_(model)
        context = model.embed_pictures(pictures_of(I2V), model.embed_text([prompt]))
        velocities.append(model(latents, 700, context))
        with pytest.raises(ValueError, match="make it with embed_pictures"):
            model(latents, 700, model.embed_text([prompt]))
    assert relative_l2(velocities[1], velocities[0]) < SAME_ROUNDING


def test_operators_that_cannot_count_say_so() -> None:
    x = torch.zeros(1, 2, 1, 16)
    with pytest.raises(ValueError, match="repeats=3"):
        Operations().read(x, x, x, 3)
