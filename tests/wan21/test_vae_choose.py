"""A plan from a budget, before there are weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from wan21.assets import Assets
from wan21.errors import UsageError
from wan21.models import WAN_VAE, model_spec
from wan21.options import Options
from wan21.pipeline import VideoPipeline
from wan21.request import make_request
from wan21.runtime import CpuRuntime
from wan21.vae import WHOLE, Budget, EncodeBudget, choose_plan
from wan21.vae.decoder import Decoder

SHAPE = (21, 60, 104)
SPEC = model_spec("t2v-1.3B")
TOO_LITTLE = Options(vae_precision="bf16", vae_budget_gib=0.05)


def test_without_a_budget_frames_are_decoded_whole() -> None:
    assert choose_plan(SPEC, Options(), SHAPE) == WHOLE


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_a_budget_gives_the_plan_that_the_loaded_decoder_would_get(precision: Any) -> None:
    with torch.device("meta"):
        decoder = Decoder(WAN_VAE, dtype=torch.float32)
    chosen = choose_plan(SPEC, Options(vae_precision=precision, vae_budget_gib=1.0), SHAPE)
    assert chosen == Budget(decoder, SHAPE, itemsize=2 if precision == "bf16" else 4).best_plan(2**30)
    assert chosen.num_tiles > 1


def test_a_budget_below_the_smallest_tiles_is_refused_with_one_that_is_enough() -> None:
    with pytest.raises(UsageError, match=r"vae_budget_gib=0\.05 is too little.*in bf16; choose [\d.]+ or more") as told:
        choose_plan(SPEC, TOO_LITTLE, SHAPE)
    enough = float(str(told.value).split("choose ")[1].split(" ")[0])
    choose_plan(SPEC, replace(TOO_LITTLE, vae_budget_gib=enough), SHAPE)
    with pytest.raises(UsageError):
        choose_plan(SPEC, replace(TOO_LITTLE, vae_budget_gib=enough - 0.01), SHAPE)


def test_a_task_that_begins_with_pictures_needs_enough_to_encode_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EncodeBudget, "least_bytes", lambda _: 2**30 + 1)
    options = Options(vae_budget_gib=1.0, vae_precision="bf16")
    assert choose_plan(SPEC, options, SHAPE).num_tiles > 1
    for name in ("i2v-14B", "flf2v-14B"):
        with pytest.raises(UsageError, match=r"vae_budget_gib=1 is too little.*choose 1\.01 or more"):
            choose_plan(model_spec(name), options, SHAPE)


class Untouchable:
    """Neither a tokenizer nor weights: whatever is asked of it fails the test."""

    def __getattr__(self, name: str) -> Any:
        pytest.fail(f"{name} was asked for")


def test_the_pipeline_refuses_it_before_anything_is_loaded() -> None:
    nothing = Untouchable()
    assets = Assets(weights=nothing, tokenizer=nothing, description="")  # type: ignore[arg-type]
    pipeline = VideoPipeline(SPEC, TOO_LITTLE, assets, CpuRuntime())
    with pytest.raises(UsageError, match="vae_budget_gib"):
        pipeline.generate(make_request(SPEC, seed=0))
