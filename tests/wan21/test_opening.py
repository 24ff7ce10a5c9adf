"""Both passes of guidance begin alike: one of them takes over what the other worked out, and no bit changes."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.wan21.test_dit import inputs, small
from tests.wan21.test_pipeline import generate, request
from wan21.attention import attend
from wan21.dit.layers import SelfAttention
from wan21.dit.opening import Opening
from wan21.errors import UsageError
from wan21.layout import Layout
from wan21.models import model_spec
from wan21.options import Options, idle_knobs
from wan21.parallel.opening import OpeningOfPair
from wan21.parallel.world import Group
from wan21.request import make_request


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def attentions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts forwards of self attention."""
    calls: list[int] = []
    forward = SelfAttention.forward

    def counted(*args: Any) -> Any:
        calls.append(1)
        return forward(*args)

    monkeypatch.setattr(SelfAttention, "forward", counted)
    return calls


def test_two_forwards_that_share_their_opening_give_the_bits_of_two_that_do_not(attentions: list[int]) -> None:
    latents, prompts = inputs(2)
    model = small()
    contexts = [model.embed_text(prompts), model.embed_text(prompts[::-1])]
    apart = [model(latents, 700, context) for context in contexts]
    num_apart = len(attentions)
    opening = Opening()
    together = [model(latents, 700, context, opening=opening) for context in contexts]
    assert all(torch.equal(one, other) for one, other in zip(together, apart, strict=True))
    assert len(attentions) - num_apart == num_apart - 1


def test_an_opening_serves_two_forwards_and_no_third() -> None:
    latents, prompts = inputs()
    model, opening = small(), Opening()
    context = model.embed_text(prompts)
    for _ in range(2):
        model(latents, 700, context, opening=opening)
    with pytest.raises(ValueError, match="this is the third"):
        model(latents, 700, context, opening=opening)
    with torch.enable_grad(), pytest.raises(ValueError, match="no gradients"):
        model(latents, 700, context, opening=Opening())


def test_of_two_processes_that_make_one_pass_each_either_attends_with_half_of_the_heads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = torch.randn(3, 2, 5, 4, 8, generator=torch.Generator().manual_seed(0))
    halves: list[torch.Tensor] = []

    def gathered(_: Group, own: torch.Tensor) -> torch.Tensor:
        halves.append(own)
        return torch.stack((halves[0], own))

    monkeypatch.setattr("wan21.parallel.opening.gathered", gathered)
    for rank in range(2):
        found = OpeningOfPair(Group((0, 1), rank)).attention(attend)(q, k, v)
    assert [half.shape for half in halves] == [(2, 5, 16)] * 2
    assert torch.equal(found, attend(q, k, v))


@pytest.mark.parametrize("chosen", [{}, {"load_strategy": "block", "offload": True}], ids=str)
def test_a_video_whose_passes_share_their_beginning_has_the_same_bits(
    chosen: dict[str, Any], attentions: list[int]
) -> None:
    asked = request(batch_size=2)  # one after the other
    plain, num_plain = generate(asked, **chosen), len(attentions)
    shared = generate(asked, share_first_attention=True, **chosen)
    assert torch.equal(shared.latents, plain.latents)
    assert len(attentions) - num_plain == num_plain - 2 * asked.num_steps


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"residual_on_host": 0.5}, "residual_on_host=0.5 keeps the residual off it; choose one"),
        ({"load_strategy": "part"}, "load_strategy=block or full"),
    ],
)
def test_what_leaves_nothing_to_share_is_refused_by_name(chosen: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Options(share_first_attention=True, **chosen)


def test_where_nothing_can_be_shared_the_knob_is_said_to_do_nothing() -> None:
    spec, vace = model_spec("tiny"), model_spec("tiny-vace")
    shares = Options(share_first_attention=True)
    pair, ring, odd = (
        Options(share_first_attention=True, layout=layout)
        for layout in (Layout(cfg=2), Layout(cfg=2, ring=2), Layout(cfg=2, ulysses=spec.dit.num_heads))
    )
    for options, asked, of in (
        (ring, make_request(spec, seed=0), spec),
        (odd, make_request(spec, seed=0), spec),
        (shares, make_request(spec, seed=0, guide_scale=1.0), spec),
        (shares, make_request(vace, seed=0), vace),
    ):
        assert "share_first_attention" in idle_knobs(options, "cuda", of, asked)
    for options in (shares, pair):
        assert not idle_knobs(options, "cuda", spec, make_request(spec, seed=0))
