"""What several processes rely on, each by itself: layouts, merged attention, shares of weights."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wan21.assets import open_assets
from wan21.attention import attend, attend_with_lse
from wan21.dit.operations import FusedOperations, Operations, RmsNorm
from wan21.dit.residual import Outs, chunks
from wan21.dit.tokens import AtHand, Brought
from wan21.errors import UsageError
from wan21.kernels import tokens
from wan21.layout import SINGLE, Layout
from wan21.memory.packing import Packing
from wan21.models import model_spec
from wan21.options import Options
from wan21.parallel import ring
from wan21.parallel.exchange import Messages
from wan21.parallel.layout import check_layout
from wan21.parallel.ring import Mean, heads_at_once
from wan21.parallel.table import SharedTable
from wan21.parallel.tokens import SharedTokens
from wan21.parallel.world import ALONE, Group, World, connect, local_device
from wan21.pipeline import VideoPipeline
from wan21.request import make_request
from wan21.runtime import CpuRuntime
from wan21.vae import Budget, DecodePlan, Vae
from wan21.waiting import ALIGNMENT
from wan21.weights import source as weight_source
from wan21.weights.checkpoint import CheckpointWeights
from wan21.weights.components import Source
from wan21.weights.inspect import inspect_folder
from wan21.weights.random import RandomWeights
from wan21.weights.write import write_folder

SPEC = model_spec("tiny")
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}  # of a number of order one


@pytest.mark.parametrize(
    ("model", "layout", "scale", "words"),
    [
        ("t2v-1.3B", Layout(ulysses=8), 5.0, ["num_heads=12", "ulysses_size=8", "choose 1, 2, 3, 4, 6 or 12"]),
        ("t2v-14B", Layout(ulysses=3), 5.0, ["num_heads=40", "choose 1, 2, 4, 5, 8, 10, 20 or 40"]),
        ("t2v-14B", Layout(cfg=2), 1.0, ["cfg_parallel=true", "sample_guide_scale=1", "cfg_parallel=false"]),
        ("t2v-14B", Layout(dit_fsdp=True), 5.0, ["dit_fsdp=true", "there is one", "ulysses_size"]),
        ("t2v-14B", Layout(t5_fsdp=True), 5.0, ["t5_fsdp=true", "t5_fsdp=false"]),
    ],
)
def test_a_layout_that_cannot_be_is_refused_with_a_way_out(
    model: str, layout: Layout, scale: float, words: list[str]
) -> None:
    spec = model_spec(model)
    with pytest.raises(UsageError) as refusal:
        check_layout(layout, spec, make_request(spec, seed=0, guide_scale=scale))
    assert all(word in str(refusal.value) for word in words)


@pytest.mark.parametrize("layout", [SINGLE, Layout(ulysses=4, ring=2, cfg=2, dit_fsdp=True), Layout(ring=7)])
def test_a_layout_that_can_be_is_taken(layout: Layout) -> None:
    check_layout(layout, SPEC, make_request(SPEC, seed=0))


@pytest.mark.parametrize("layout", [Layout(ring=8), Layout(ulysses=4, ring=2), Layout(cfg=2, ulysses=4)])
def test_twelve_heads_run_on_eight_ranks_by_the_way_out_that_the_refusal_names(layout: Layout) -> None:
    spec = model_spec("t2v-1.3B")
    assert layout.world_size == 8
    check_layout(layout, spec, make_request(spec, seed=0))


@pytest.mark.parametrize(
    ("wrong", "word"), [({"ulysses": 0}, "ulysses_size=0"), ({"ring": -1}, "ring_size=-1"), ({"cfg": 3}, "cfg=3")]
)
def test_sizes_that_are_none_are_refused_by_name(wrong: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Layout(**wrong)


@pytest.mark.parametrize(
    ("chosen", "word"),
    [
        (
            {"layout": Layout(ulysses=2, dit_fsdp=True), "load_strategy": "block"},
            "dit_fsdp=true and load_str",
        ),
        ({"layout": Layout(ulysses=2, t5_fsdp=True), "load_strategy": "part"}, "t5_fsdp=true and load_str"),
        ({"layout": Layout(ulysses=2, t5_fsdp=True), "t5_cpu": True}, "t5_cpu=true"),
    ],
)
def test_two_places_for_one_weight_are_refused(chosen: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        Options(**chosen)


def test_a_world_of_another_size_is_refused_with_the_command_that_starts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match=r"ulysses_size=2, cfg_parallel=true needs 4 .* are 3; .*nproc-per-node=4"):
        connect(Layout(ulysses=2, cfg=2), CpuRuntime())
    with pytest.raises(UsageError, match=r"ulysses_size=1 needs 1 .* are 3; .* sizes whose product is 3"):
        connect(SINGLE, CpuRuntime())
    monkeypatch.delenv("WORLD_SIZE")
    assert connect(SINGLE, CpuRuntime()) is ALONE


def test_a_pipeline_refuses_a_world_of_another_layout() -> None:
    options, runtime = Options(layout=Layout(ring=2)), CpuRuntime()
    with pytest.raises(UsageError, match="connect with the layout of the options"):
        VideoPipeline(SPEC, options, open_assets(SPEC, options, runtime), runtime)


def test_a_rank_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert local_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [local_device(device) for device in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]


def naive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and the log of its denominator, [B, Lq, N, K] and [B, Lq, N, 1], in float64."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    out, lse = scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True)
    return out.transpose(1, 2), lse.transpose(1, 2)


def queries_keys_values(num_keys: int, dtype: torch.dtype, device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(num_keys)
    return [torch.randn(2, length, 4, 32, generator=generator).to(device, dtype) for length in (19, num_keys, num_keys)]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_attention_tells_the_log_of_its_denominator(dtype: torch.dtype, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    q, k, v = queries_keys_values(37, dtype, device)
    out, lse = attend_with_lse(q, k[:, :33], v[:, :33])
    expected_out, expected_lse = naive(q, k[:, :33], v[:, :33])
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    assert out.shape == expected_out.shape
    assert lse.shape == expected_lse.shape
    assert (out.double() - expected_out).abs().max() < ROUNDING[dtype]
    assert (lse.double() - expected_lse).abs().max() < ROUNDING[dtype]


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
@pytest.mark.parametrize("bounds", [(0, 37), (0, 1, 37), (0, 12, 13, 30, 37)])
def test_attention_to_parts_of_the_keys_joins_to_attention_to_all(
    bounds: tuple[int, ...], dtype: torch.dtype, *, is_fused: bool
) -> None:
    q, k, v = queries_keys_values(37, dtype)
    result = torch.empty(q.shape[0], q.shape[1], 7, q.shape[3], dtype=dtype)[:, :, 2:6]  # some heads of more
    mean = Mean(result, len(bounds) - 1, is_fused=is_fused)
    for start, stop in pairwise(bounds):
        mean.add(*attend_with_lse(10 * q, k[:, start:stop], v[:, start:stop]))  # nearly one key each
    assert (result.double() - naive(10 * q, k, v)[0]).abs().max() < 5 * ROUNDING[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=str)
def test_the_kernel_that_joins_attention_equals_its_words_in_torch(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    generator = torch.Generator("cuda").manual_seed(0)
    out, more = (
        torch.randn(2, 77, 9, 24, generator=generator, device="cuda").to(kind)[:, :, 2:7]
        for kind in (torch.float32, dtype)
    )
    lse, more_lse = (
        5 * torch.randn(2, 5, 77, generator=generator, device="cuda").transpose(1, 2)[..., None] for _ in "12"
    )
    found = []
    for join in (tokens.join_attention, tokens.join_attention_plainly):
        result, joint = torch.zeros_like(more), lse.clone()
        join(out, joint, more, more_lse, result, joint)
        found.append((result.float(), joint))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=ROUNDING[dtype])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_heads_are_written_to_a_place_for_each_member() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, 24, generator=generator)
    layer, norm = nn.Linear(24, 24), RmsNorm(24, 1e-6)
    norm.weight.data.copy_(torch.randn(24, generator=generator))
    turns = torch.polar(torch.ones(5, 1, 2), torch.randn(5, 1, 2, generator=generator))
    with torch.no_grad():
        for operations in (Operations(), FusedOperations()):
            dealt = torch.empty(3, 5, 1, 2, 4).permute(2, 1, 0, 3, 4)
            operations.heads(x.clone(), norm, 6, turns, dealt)
            assert torch.equal(dealt.flatten(2, 3), operations.heads(x.clone(), norm, 6, turns))
            operations.linear(layer, x, dealt)
            torch.testing.assert_close(dealt.flatten(2), layer(x))  # products of fewer columns


def test_tokens_that_are_shared_keep_no_gradients() -> None:
    shared = SharedTokens(5, World(sequence=Group((0, 1), 0)), None)
    with pytest.raises(ValueError, match="no_grad"):
        shared.own(torch.zeros(1, 5, 3), 1)


def sources(tmp_path: Path) -> list[Callable[[], Source]]:
    weights = RandomWeights(SPEC, 0, CpuRuntime().generator)
    write_folder(tmp_path, SPEC, weights, num_shards=2)
    stored = CheckpointWeights(inspect_folder(tmp_path, SPEC))
    return [weights.dit, stored.dit, stored.vae]


def test_a_part_of_a_weight_is_what_lies_there_in_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_source, "STAGING_BYTES", 4096)  # a weight takes several pieces
    for open_source in sources(tmp_path):
        with open_source() as source:
            name = max(source.shapes(), key=lambda name: math.prod(source.shapes()[name]))
            whole = torch.empty(source.shapes()[name])
            source.write(name, whole)
            for first, count in ((0, 10), (500, 1500), (whole.numel() - 3, 3), (7, 0)):
                part = torch.empty(count, dtype=torch.bfloat16)
                source.write_part(name, part, first)
                assert torch.equal(part, whole.view(-1)[first : first + count].bfloat16())


@pytest.mark.parametrize("num_shares", [1, 2, 3, 8])
def test_shares_of_a_packing_laid_end_to_end_are_the_packing(num_shares: int) -> None:
    parameters = {
        "wide": nn.Parameter(torch.randn(31, 17)),
        "small": nn.Parameter(torch.randn(3).half()),
        "last": nn.Parameter(torch.randn(5, 100).bfloat16()),
    }

    def write(name: str, to: torch.Tensor, first: int) -> None:
        to.copy_(parameters[name].detach().view(-1)[first : first + to.numel()])

    packing = Packing(parameters, num_shares)
    size = packing.num_bytes // num_shares
    assert size * num_shares == packing.num_bytes
    assert size % ALIGNMENT == 0
    shares = [torch.zeros(size, dtype=torch.uint8) for _ in range(num_shares)]
    for rank, share in enumerate(shares):
        packing.fill_share(share, rank * size, write)
    views = packing.views(torch.cat(shares))
    assert all(torch.equal(views[name], parameter) for name, parameter in parameters.items())


def test_the_parts_of_a_shared_table_together_are_the_table() -> None:
    table = nn.Embedding(11, 4)
    ids = torch.tensor([[0, 10, 3, 4, 3]])
    found = torch.zeros(1, 5, 4)
    for rank in range(4):
        part = SharedTable(table, Group((rank,)), torch.device("cpu"))
        part.first_row, part.num_rows = 3 * rank, min(3, 11 - 3 * rank)
        part.weight = nn.Parameter(table.weight[part.first_row : part.first_row + part.num_rows].detach())
        found += part(ids)
    assert torch.equal(found, table(ids))


def test_ranks_that_share_tiles_get_a_plan_whose_largest_share_is_least() -> None:
    with torch.device("meta"):
        decoder = Vae(SPEC.vae).decoder
    budget = Budget(decoder, (21, 60, 104), itemsize=4)
    alone, four = budget.best_plan(math.inf), budget.best_plan(math.inf, 4)
    assert alone == DecodePlan()
    assert four.num_tiles == 4
    assert budget.work(four, 4) < 0.35 * budget.work(alone)  # halos, and what all do
    assert budget.num_bytes(four) < 0.5 * budget.num_bytes(alone)


class TwoAlike:
    """A ring of two members with the same keys and values; notes what happens in which order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[str] = []
        self.sent: list[torch.Tensor] = []
        self.tokens = SharedTokens(10, World(ring=PAIR, sequence=PAIR), self._attend)
        monkeypatch.setattr(ring, "exchange", self._exchange)

    def _attend(self, *heads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.events.append("attend")
        return attend_with_lse(*heads)

    def _exchange(
        self, _: Group, sends: dict[int, torch.Tensor], receives: dict[int, torch.Tensor], __: object
    ) -> Messages:
        self.events.append("send")
        self.sent.append(sends[1])
        receives[1].copy_(sends[1])
        return Messages([], [])

    def collect(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: int) -> tuple[Brought, ...]:
        def produce(rows: slice, _: torch.Tensor, outs: Outs) -> Iterator[torch.Tensor]:
            for name, heads, out in zip("vkq", (v, k, q), outs, strict=True):
                self.events.append(name)
                assert out is not None
                yield out.copy_(heads[:, rows].view(out.shape))

        room = self.tokens.room(2, (1, 5, 4, 8), q)
        return self.tokens.collect(chunks(q.flatten(2), size), produce, (*room, torch.empty_like(room[0])))


PAIR = Group((0, 1), 0)


def test_keys_set_out_before_the_last_queries_are_made_and_two_messages_are_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = torch.randn(3, 1, 5, 4, 8, generator=torch.Generator().manual_seed(0))
    pair = TwoAlike(monkeypatch)
    with torch.no_grad():
        values, keys, queries = pair.collect(q, k, v, 3)
        ((_, found),) = pair.tokens.read(attend, queries, keys, values, 5)
    assert pair.events[:8] == ["v", "k", "q", "v", "k", "send", "send", "q"]
    assert pair.events[8:] == ["attend", "attend", "send"] * 2 + ["attend"] * 4  # four groups of one head
    assert {one.untyped_storage().data_ptr() for one in pair.sent} == {keys.here().untyped_storage().data_ptr()}
    torch.testing.assert_close(found, attend(q, k, v))


def test_keys_that_lie_elsewhere_are_copied_as_they_set_out_and_one_message_is_ahead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    q, k, v = torch.randn(3, 1, 5, 4, 8, generator=torch.Generator().manual_seed(0))
    pair = TwoAlike(monkeypatch)
    ((_, found),) = pair.tokens.read(attend, AtHand(q), AtHand(k), AtHand(v), 5)
    assert pair.events == ["send", *["attend", "attend", "send"] * 3, "attend", "attend"]
    assert torch.equal(torch.stack(pair.sent, 3).squeeze(4), torch.stack((v, k)))
    torch.testing.assert_close(found, attend(q, k, v))


def test_heads_go_round_in_groups_that_fill_a_gpu() -> None:
    assert heads_at_once(40, 37_800) == 8  # 5 x 18 rounds of 132 tiles; 10 at once would take 4 x 23
    assert heads_at_once(12, 16_380) == 3
    assert heads_at_once(1, 5) == 1
    assert all(4 * heads_at_once(heads, 700) <= heads + 3 for heads in range(1, 41))
