"""What can be asked for, and what is refused before anything is loaded."""

import subprocess
import sys

import pytest

from wan21.errors import UsageError
from wan21.models import MODELS, model_spec
from wan21.options import Options, idle_knobs
from wan21.request import make_request
from wan21.shapes import VideoShape, parse_size


@pytest.mark.parametrize(
    ("width", "height", "tokens"), [(832, 480, 32_760), (1280, 720, 75_600), (480, 832, 32_760), (1024, 1024, 86_016)]
)
def test_tokens_of_81_frames(width: int, height: int, tokens: int) -> None:
    assert VideoShape(num_frames=81, height=height, width=width).num_tokens == tokens


def test_an_image_of_1024_has_4096_tokens() -> None:
    assert make_request(model_spec("t2i-14B"), seed=0).shape.num_tokens == 4096


@pytest.mark.parametrize("name", list(MODELS))
def test_every_task_has_working_defaults(name: str) -> None:
    spec = model_spec(name)
    for size in spec.sizes:
        request = make_request(spec, seed=0, size=size)
        assert request.num_steps == spec.default_steps
        assert request.shape.latent[0] == (spec.default_frame_num - 1) // 4 + 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": "100*100"}, ["100*100", "t2v-1.3B", "832*480"]),
        ({"size": "832x480"}, ["832x480", "WIDTH*HEIGHT"]),
        ({"size": "0*480"}, ["0*480"]),
        ({"frame_num": 80}, ["80", "4n+1", "77 or 81"]),
        ({"frame_num": 0}, ["frame_num=0", "1 or 5"]),
        ({"solver": "euler"}, ["euler", "unipc, dpm++"]),
        ({"num_steps": 0}, ["sample_steps=0"]),
        ({"shift": -1.0}, ["sample_shift=-1"]),
        ({"guide_scale": float("nan")}, ["sample_guide_scale=nan"]),
        ({"seed": -1}, ["base_seed=-1"]),
        ({"batch_size": 0}, ["batch_size=0"]),
        ({"micro_batch_size": 2}, ["micro_batch_size=2"]),
    ],
)
def test_impossible_requests_name_value_rule_and_way_out(changes: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UsageError) as refused:
        make_request(model_spec("t2v-1.3B"), **({"seed": 0} | changes))  # type: ignore[arg-type]
    for word in words:
        assert word in str(refused.value)


def test_an_image_task_refuses_frames() -> None:
    with pytest.raises(UsageError, match="frame_num=1"):
        make_request(model_spec("t2i-14B"), seed=0, frame_num=5)


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"t2v-1\.3B"):
        model_spec("t2v-2B")
    with pytest.raises(UsageError, match="fp16, bf16, fp32"):
        Options(precision="fp8")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="attention_slicing=0"):
        Options(attention_slices=0)


def test_sides_must_be_multiples_of_sixteen() -> None:
    with pytest.raises(UsageError, match="choose 480"):
        VideoShape(num_frames=5, height=488, width=832)
    assert parse_size("832*480") == (832, 480)


def test_knobs_that_change_nothing_are_named_with_the_reason() -> None:
    options = Options(t5_cpu=True, gradient_checkpointing=True)
    assert set(idle_knobs(options, "cpu")) == {"t5_cpu", "gradient_checkpointing"}
    assert set(idle_knobs(options, "cuda")) == {"gradient_checkpointing"}
    assert idle_knobs(Options(), "cpu") == {}


def test_planning_needs_no_torch() -> None:
    code = "import sys, wan21.models, wan21.request, wan21.options, wan21.events; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
