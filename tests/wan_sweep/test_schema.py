import re
from pathlib import Path

import pytest
import yaml

from wan21.models import MODELS, ModelSpec
from wan_sweep.schema import KNOBS, Job, Scalar, asked_key, job_key, knobs_help, text


def test_config_yaml_has_every_knob_with_default_and_meaning(repository: Path) -> None:
    written = (repository / "conf" / "config.yaml").read_text()
    for knob in KNOBS.values():
        assert f"\n# {knob.rule.meaning} [{knob.allowed}]\n{knob.name}: {text(knob.default)}\n" in written


def test_config_yaml_has_no_key_that_is_no_knob(repository: Path) -> None:
    values = yaml.safe_load((repository / "conf" / "config.yaml").read_text())
    assert {*KNOBS, "defaults", "hydra", "repeat"} == set(values)


def test_every_key_of_every_preset_is_a_knob_with_a_comment(repository: Path) -> None:
    for group in ("model", "optimization", "parallel", "logging", "experiment"):
        for path in (repository / "conf" / group).glob("*.yaml"):
            lines = path.read_text().splitlines()
            assert lines[0] == "# @package _global_"
            assert lines[1].startswith("# ")
            assert set(yaml.safe_load(path.read_text())) <= {*KNOBS, "hydra"}
            if group in {"optimization", "parallel", "logging"}:
                assert all("  # " in line for line in lines[2:])


def test_every_model_has_a_preset(repository: Path) -> None:
    assert {"auto", *MODELS} == {path.stem for path in (repository / "conf" / "model").glob("*.yaml")}
    for path in (repository / "conf" / "model").glob("*.yaml"):
        assert {"model": path.stem} == yaml.safe_load(path.read_text())


def defaults_line(spec: ModelSpec) -> str:
    """What the file of a model says of its sizes and defaults."""
    others = ", ".join(size for size in spec.sizes if size != spec.default_size)
    low = "" if spec.shift_480p is None else f" ({spec.shift_480p:g} at 480p)"
    return (
        f"# Defaults: size={spec.default_size} (or {others}), frame_num={spec.default_frame_num}, "
        f"sample_steps={spec.default_steps}, sample_shift={spec.default_shift:g}{low}."
    )


@pytest.mark.parametrize("spec", MODELS.values(), ids=MODELS)
def test_the_file_of_each_model_tells_its_sizes_and_defaults(spec: ModelSpec, repository: Path) -> None:
    assert defaults_line(spec) in (repository / "conf" / "model" / f"{spec.name}.yaml").read_text().splitlines()


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("precision", "fp16, bf16 or fp32"),
        ("offload", "true or false"),
        ("attention_slicing", "true, false or a whole number of at least 1"),
        ("frame_num", "a whole number or null"),
        ("memory_limit_gib", "a number above 0 or null"),
        ("name", "text"),
    ],
)
def test_allowed_values_are_said_in_words(name: str, allowed: str) -> None:
    assert allowed == KNOBS[name].allowed


def test_the_help_page_names_every_knob() -> None:
    page = knobs_help()
    assert all(re.search(rf"^  {name}=", page, re.MULTILINE) for name in KNOBS)
    assert "$" not in page  # Hydra puts the page through string.Template


def test_a_job_survives_its_dictionary() -> None:
    job = Job(model="tiny", attention_slicing=4, prompt="a kite", sample_shift=3.5)
    assert job == Job.from_dict({**job.to_dict(), "something_else": 1})


def test_the_key_ignores_what_does_not_shape_the_result() -> None:
    job = Job(model="tiny")
    same = job.replace(name="other", timeout_s=3.0, resume=False, save_video=False, output_root="/x", track=False)
    assert job_key(job, 0) == job_key(same, 0)
    assert asked_key(job, 0) != asked_key(same, 0)


@pytest.mark.parametrize("change", [{"precision": "bf16"}, {"prompt": "x"}, {"base_seed": 1}, {"block_events": True}])
def test_the_key_follows_what_shapes_the_result(change: dict[str, str | int | bool]) -> None:
    assert job_key(Job(), 0) != job_key(Job().replace(**change), 0)


def test_repeats_have_keys_of_their_own() -> None:
    assert job_key(Job(), 0) != job_key(Job(), 1)


def test_a_checkpoint_counts_by_its_content_and_not_by_its_path() -> None:
    here, there = Job(ckpt_dir="/a"), Job(ckpt_dir="/b")
    assert job_key(here, 0, weights="f00") == job_key(there, 0, weights="f00")
    assert job_key(here, 0, weights="f00") != job_key(here, 0, weights="ba5")


@pytest.mark.parametrize(
    ("value", "shown"), [(True, "true"), (None, "null"), (5.0, "5"), (0.1234567891, "0.1234567891"), (3, "3")]
)
def test_values_are_written_as_on_the_command_line(value: Scalar, shown: str) -> None:
    assert shown == text(value)
