"""The search for the fastest configuration, with a made-up estimator that answers at once."""

import io
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain, product
from random import Random
from typing import Any

import pytest

from wan21.errors import UsageError, VaeBudgetError
from wan_sweep.cards import card_named
from wan_sweep.environment import Machine
from wan_sweep.plan.__main__ import main
from wan_sweep.planner import __main__ as planner_process
from wan_sweep.planner import client
from wan_sweep.planner.client import margin_of, nearest_card
from wan_sweep.planner.ladder import ladders
from wan_sweep.planner.search import Found, Search
from wan_sweep.rules import resolve
from wan_sweep.schema import KNOBS, Job, Scalar
from wan_sweep.units import GIB

CONTEXT_GIB, MARGIN_GIB = 0.5, 0.25
T5, DIT, VAE = 10.6, 2.6, 0.5
MOST_ESTIMATES = 12


def job(**knobs: Scalar) -> Job:
    asked = Job(model="t2v-1.3B", mode="estimate", card="RTX4060-8GB").replace(**knobs)
    return resolve(asked, Machine()).job


class MadeUp:
    """An estimator with simple sums in place of a pipeline.

    Args:
        activations: GiB of denoising besides weights, of a video of 81 frames.
        whole: GiB of decoding whole frames in float32.
        least_budget: GiB of the VAE below which no tile fits.
    """

    def __init__(self, activations: float = 1.0, whole: float = 5.5, least_budget: float = 0.4) -> None:
        self.asked: list[Job] = []
        self._activations = activations
        self._whole = whole
        self.least_budget = least_budget

    def __call__(self, one: Job) -> Mapping[str, Any]:
        self.asked.append(one)
        return {"metrics": self.metrics(one)}

    def metrics(self, one: Job) -> Mapping[str, int]:
        kept = {"full": 100.0, "block": float(one.resident_gib) + 0.4, "part": 0.2}[one.load_strategy]
        text, dit = min(T5, kept + 2.0), min(DIT, kept)
        share = (1.0 + 0.2 * one.share_first_attention) * (0.6 if one.attention_slicing else 1.0)
        share -= 0.1 * (one.rows_at_once is not None) + 0.2 * one.residual_on_host
        activations = self._activations * one.frame_num / 81 * share
        whole = self._whole * (0.5 if one.vae_precision == "bf16" else 1.0)
        if one.vae_budget_gib is not None and one.vae_budget_gib < self.least_budget:
            raise VaeBudgetError("vae_budget_gib is too little", self.least_budget)
        decode = VAE + min(whole, one.vae_budget_gib or whole)
        beside = 0.0 if one.offload else T5 + DIT + VAE
        needs = {
            "load": beside or max(text, dit),
            "encode_text": beside or text,
            "denoise": activations + (beside or dit),
            "decode": decode + beside,
        }
        reserved = {f"memory/peak/{name}/reserved_bytes": int(gib * GIB) for name, gib in needs.items()}
        return {**reserved, "memory/peak/allocated_bytes": 0, "memory/peak/host_pinned_bytes": 0}


def search(vram_gib: float, made_up: MadeUp) -> Search:
    return Search(
        card_named("RTX4060-8GB"),
        vram_bytes=int(vram_gib * GIB),
        margin_bytes=int(MARGIN_GIB * GIB),
        context_bytes=int(CONTEXT_GIB * GIB),
        estimate=made_up,
        say=lambda words: None,  # noqa: ARG005
    )


def fastest(vram_gib: float, **knobs: Scalar) -> tuple[Found, MadeUp]:
    made_up = MadeUp()
    return search(vram_gib, made_up).fastest(job(**knobs)), made_up


@pytest.mark.parametrize(
    ("vram_gib", "knobs"),
    [
        (24, {"share_first_attention": True}),
        (12, {"offload": True, "share_first_attention": True}),
        (8, {"offload": True, "load_strategy": "block", "share_first_attention": True}),
        (6, {"offload": True, "load_strategy": "block", "share_first_attention": True, "vae_budget_gib": 4.0}),
        (3, {"offload": True, "load_strategy": "part", "vae_budget_gib": 1.5}),
    ],
)
def test_the_fastest_that_fits_is_found_with_few_estimates(vram_gib: float, knobs: dict[str, Scalar]) -> None:
    found, made_up = fastest(vram_gib)
    assert found.best is not None
    assert {name: value for name, value in found.best.knobs.items() if name != "resident_gib"} == knobs
    assert found.best.needed_bytes <= (vram_gib - MARGIN_GIB) * GIB
    assert len(made_up.asked) <= MOST_ESTIMATES
    assert len(set(made_up.asked)) == len(made_up.asked)
    assert all(one.excess for one in found.refused)
    assert not any(one.excess for one in found.others)


def test_where_everything_fits_the_runner_up_has_a_component_at_a_time_on_the_card() -> None:
    found, _ = fastest(24)
    assert [one.knobs.get("offload") for one in found.others] == [True]


def test_what_stays_on_the_card_is_as_much_as_fits() -> None:
    found, _ = fastest(8)
    assert found.best is not None
    assert found.best.knobs["resident_gib"] == 2.6  # all of the transformer
    found, _ = fastest(5)
    assert found.best is not None
    assert found.best.knobs["resident_gib"] == 1.82  # with it T5 takes 4.22 of 4.25 GiB, and with a block more 4.31


def test_what_the_user_chose_stays() -> None:
    found, made_up = fastest(6, vae_precision="fp16", load_strategy="block")
    assert found.best is not None
    assert {one.vae_precision for one in made_up.asked} == {"fp16"}
    assert {one.load_strategy for one in made_up.asked} == {"block"}


def test_no_rung_contradicts_what_the_user_chose() -> None:
    found, made_up = fastest(3, share_first_attention=True)  # which goes with neither parts nor a residual on the host
    assert found.best is None
    assert {one.load_strategy for one in made_up.asked} == {"block"}
    assert {one.residual_on_host for one in made_up.asked} == {0}


def test_where_nothing_fits_there_is_no_best_and_all_were_refused() -> None:
    found, made_up = fastest(1)
    assert found.best is None
    assert found.others == ()
    assert found.refused
    assert len(made_up.asked) <= 2 * MOST_ESTIMATES


def test_a_refused_budget_is_not_followed_by_smaller_ones_of_the_same_format() -> None:
    _, made_up = fastest(1.6)
    for precision in ("fp32", "bf16"):
        tried = {one.vae_budget_gib for one in made_up.asked if one.vae_precision == precision}
        assert len(tried & {0.35, 0.5, 0.69}) < 3


def exhaustive(one: Job, made_up: MadeUp, vram_gib: float) -> Mapping[str, Any] | None:
    """The knobs of the first pair of rungs that fits, of all pairs."""
    room = int((vram_gib - CONTEXT_GIB - MARGIN_GIB) * GIB)
    steps = ladders(one, room)
    for denoise, decode in product(chain.from_iterable(steps.denoise), chain.from_iterable(steps.decode)):
        knobs = {"offload": True, **denoise.knobs, **decode.knobs}
        with suppress(UsageError):
            metrics = made_up.metrics(one.replace(**knobs))
            if max(metrics.values()) <= room:
                return {name: value for name, value in knobs.items() if value != KNOBS[name].default}
    return None


@pytest.mark.parametrize("seed", range(40))
def test_what_is_left_out_changes_no_answer(seed: int) -> None:
    draw = Random(seed)
    vram_gib = draw.uniform(1.5, 15.0)
    made_up = MadeUp(draw.uniform(0.1, 4.0), draw.uniform(0.5, 16.0), draw.choice([0.1, 0.4, 0.6, 1.2]))
    found = search(vram_gib, made_up).fastest(job())
    assert exhaustive(job(), made_up, vram_gib) == (None if found.best is None else found.best.knobs)
    assert len(made_up.asked) <= 2 * MOST_ESTIMATES


def test_the_next_faster_rung_of_each_ladder_was_seen_not_to_fit() -> None:
    found, _ = fastest(5)
    assert found.best is not None
    for faster in ({"resident_gib": 1.91}, {"vae_budget_gib": 4.0}):
        assert {**found.best.knobs, **faster} in [one.knobs for one in found.refused]


def test_the_most_frames_that_fit_need_more_when_one_step_longer() -> None:
    made_up = MadeUp()
    one = search(4, made_up)
    largest = one.largest(job(), "frame_num")
    assert largest is not None
    room = 4 - CONTEXT_GIB - MARGIN_GIB
    needed = 0.2 + largest.frame_num / 81 * 0.3  # with all that makes it smaller
    assert needed <= room < needed + 4 / 81 * 0.3
    assert one.largest(job(), "size").size in {"832*480", "480*832"}
    assert search(0.8, made_up).largest(job(), "frame_num") is None


def test_weights_that_alone_do_not_fit_are_no_rung() -> None:
    families = ladders(job(), 8 * GIB).denoise
    assert all(rung.knobs["load_strategy"] != "full" for family in families for rung in family)
    assert ladders(job(t5_cpu=True), 8 * GIB).denoise[0][0].knobs["load_strategy"] == "full"


def test_where_too_little_may_wait_on_the_host_no_weights_are_streamed_and_the_answer_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up = MadeUp()

    def ask(one: Job, *_: object, vram_bytes: int, **__: object) -> dict[str, Any]:
        return search(vram_bytes / GIB, made_up).fastest(one).to_json()

    monkeypatch.setattr("wan_sweep.plan.__main__.ask", ask)
    question = ["model=t2v-1.3B", "card=RTX4060-8GB", "vram_gib=6"]
    assert main([*question, "host_budget_gib=0.1"]) == 1
    assert {one.load_strategy for one in made_up.asked} == {"full"}
    told = capsys.readouterr().out
    assert f"Nothing fits into 6.00 GiB: the least found needs {T5 + CONTEXT_GIB + MARGIN_GIB:.2f} GiB" in told
    assert "host_budget_gib=0.1 is too little: with load_strategy=part t5 needs 2.66 GiB" in told
    assert "with load_strategy=block 1.079 is enough" in told
    assert main([*question, "host_budget_gib=1.1"]) == 0
    assert {one.load_strategy for one in made_up.asked} == {"full", "block"}


def test_where_no_tile_fits_into_the_card_the_least_that_would_do_is_looked_at() -> None:
    found, made_up = fastest(0.8)
    assert found.best is None
    least = min((one for one in found.refused if not one.refusal), key=lambda one: one.needed_bytes)
    assert least.knobs["vae_budget_gib"] == made_up.least_budget
    # T5 is streamed in parts, and the VAE takes its budget beside its weights.
    assert least.needed_bytes == int((2.2 + CONTEXT_GIB) * GIB)
    assert least.needs["decode"] == int((VAE + made_up.least_budget) * GIB)


def test_where_no_tile_fits_into_the_chosen_budget_the_answer_is_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "wan_sweep.plan.__main__.ask", lambda one, *_, **__: search(24, MadeUp()).fastest(one).to_json()
    )
    assert main(["model=t2v-1.3B", "card=RTX4060-8GB", "vae_budget_gib=0.1"]) == 1
    assert capsys.readouterr().out.endswith("Nothing fits into 8.00 GiB: vae_budget_gib is too little.\n")


def test_what_an_estimate_refuses_for_another_reason_is_the_answer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: Job) -> Mapping[str, Any]:
        raise UsageError("card=X has no table; choose another")

    one = Search(
        card_named("H100-80GB"),
        vram_bytes=80 * GIB,
        margin_bytes=GIB,
        context_bytes=GIB,
        estimate=refuse,
        say=lambda words: None,  # noqa: ARG005
    )
    with pytest.raises(UsageError, match="has no table"):
        one.fastest(job())
    child = "import json; input(); print(json.dumps({'refusal': 'card=X has no table; choose another'}))"
    monkeypatch.setattr(client, "PLANNER", (sys.executable, "-c", child))
    assert main(["model=t2v-1.3B", "vram_gib=8"]) == 2
    assert capsys.readouterr().err == "wan_sweep: card=X has no table; choose another\n"


def test_the_planners_process_tells_what_an_estimate_refuses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: Mapping[str, Any]) -> dict[str, Any]:
        raise UsageError("card=X has no table")

    monkeypatch.setattr("wan_sweep.planner.__main__.answer", refuse)
    monkeypatch.setattr("sys.stdin", io.StringIO("{}"))
    planner_process.main()
    assert json.loads(capsys.readouterr().out) == {"refusal": "card=X has no table"}


def test_cards_are_found_by_size_and_a_margin_is_kept() -> None:
    assert nearest_card(8 * GIB).name == "RTX4060-8GB"
    assert margin_of(8 * GIB) == GIB // 4
    assert margin_of(100 * GIB) == 2 * GIB


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model=t2v-1.3B"], "for which card? give vram_gib=8, or card=NAME"),
        (["card=TITAN"], "card=TITAN is not known; choose H100-80GB"),
        (["vram_gib=0"], "vram_gib=0 cannot be: choose a number above 0"),
        (["vram_gib=8", "max=prompt"], "max=prompt cannot be: choose frame_num or size"),
        (["vram_gib=8", "nonsense=1"], "there is no knob nonsense"),
        (["vram_gib=8", "precision=fp16,bf16"], "a plan is for one workload"),
        (["vram_gib=8", "model=t2v-1.3B", "frame_num=80"], "frame_num=80 is not of the form 4n+1"),
    ],
)
def test_a_question_that_cannot_be_is_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
