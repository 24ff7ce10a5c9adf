from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from wan21.models import MODELS
from wan_sweep.convert import add_repeats, candidates_of, grid_of, is_grid, job_of, parse, value_of
from wan_sweep.errors import UsageError
from wan_sweep.schema import KNOBS, Job

CONF = Path(__file__).resolve().parents[2] / "conf"
GROUPS = ("model", "optimization", "parallel", "logging", "experiment")
CHOICES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]


@pytest.fixture(autouse=True)
def hydra_is_ready() -> Iterator[None]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


def composed(overrides: Sequence[str]) -> DictConfig:
    return compose("config", overrides=list(overrides))


def sweep_config(overrides: Sequence[str]) -> DictConfig:
    from hydra.types import RunMode

    return (
        GlobalHydra.instance().config_loader().load_configuration("config", list(overrides), run_mode=RunMode.MULTIRUN)
    )


def test_without_overrides_the_job_is_the_default_one() -> None:
    job = job_of(composed([]))
    assert Job() == job.replace(output_root="outputs")


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_preset_composes_and_converts(group: str, name: str) -> None:
    prefix = "+" if group == "experiment" else ""
    assert isinstance(job_of(composed([f"{prefix}{group}={name}"])), Job)


@pytest.mark.parametrize("name", [name for group, name in CHOICES if group == "experiment"])
def test_every_experiment_gives_jobs(name: str) -> None:
    config = sweep_config([f"+experiment={name}"])
    candidates = candidates_of(config, GlobalHydra.instance().config_loader())
    assert len(candidates) >= 1
    assert {candidate.job.name for candidate in candidates} == {name}


def test_the_study_of_tasks_has_every_model_at_its_default_size_and_length() -> None:
    candidates = candidates_of(sweep_config(["+experiment=tasks"]), GlobalHydra.instance().config_loader())
    jobs = [candidate.job for candidate in candidates]
    assert sorted(job.model for job in jobs) == sorted(name for name in MODELS if not name.startswith("tiny"))
    assert {(job.size, job.frame_num) for job in jobs} == {(None, None)}


def test_a_preset_wins_over_the_root_and_the_command_line_over_both() -> None:
    assert job_of(composed(["optimization=memory_opt"])).offload is True
    assert job_of(composed(["optimization=memory_opt", "offload=false"])).offload is False
    assert job_of(composed(["offload=false", "optimization=memory_opt"])).offload is False
    assert job_of(composed(["+experiment=baseline", "name=mine"])).name == "mine"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("precision=fp8", "precision=fp8 cannot be: choose fp16, bf16 or fp32"),
        ("offload=maybe", "offload=maybe cannot be: choose true or false"),
        ("offload=1", "offload=1 cannot be: choose true or false"),
        ("offload=null", "offload=null cannot be: choose true or false"),
        ("frame_num=abc", "frame_num=abc cannot be: choose a whole number or null"),
        ("frame_num=9.5", "frame_num=9.5 cannot be: choose a whole number or null"),
        ("batch_size=true", "batch_size=true cannot be: choose a whole number of at least 1"),
        ("batch_size=0", "batch_size=0 cannot be: choose a whole number of at least 1"),
        ("attention_slicing=0", "attention_slicing=0 cannot be: choose true, false or a whole number of at least 1"),
        ("memory_limit_gib=0", "memory_limit_gib=0 cannot be: choose a number above 0 or null"),
        ("timeout_s=nan", "timeout_s=nan cannot be: choose a number above 0 or null"),
        ("size=[1,2]", "size=[1, 2] cannot be: choose text or null"),
        ("name=a/b", "name=a/b is not a folder's name"),
        ("output_root='~/x'", "output_root=~/x was not expanded by the shell"),
        ("~precision", "precision is missing from the configuration"),
        ("+precison=fp16", "there is no knob precison"),
        ("prompt=${nothing}", "the configuration does not resolve"),
    ],
)
def test_an_impossible_value_is_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        job_of(composed([override]))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("attention_slicing", True, True),
        ("attention_slicing", 4, 4),
        ("sample_shift", 3, 3.0),
        ("prompt", 2024, "2024"),
        ("ckpt_dir", None, None),
    ],
)
def test_values_get_the_knobs_own_type(name: str, given: object, kept: object) -> None:
    value = value_of(KNOBS[name], given)
    assert (kept, type(kept)) == (value, type(value))


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    job = job_of(composed(["ckpt_dir=weights", "output_root=out"]))
    assert (str(tmp_path / "weights"), str(tmp_path / "out")) == (job.ckpt_dir, job.output_root)


def test_the_grid_is_that_of_hydra_in_its_order() -> None:
    config = sweep_config(["precision=fp16,bf16", "offload=true,false", "sample_steps=2"])
    combinations, varying = grid_of(config, GlobalHydra.instance().config_loader())
    assert varying == ["precision", "offload"]
    assert combinations == [
        ["precision=fp16", "offload=True", "sample_steps=2"],
        ["precision=fp16", "offload=False", "sample_steps=2"],
        ["precision=bf16", "offload=True", "sample_steps=2"],
        ["precision=bf16", "offload=False", "sample_steps=2"],
    ]


def test_axes_tell_knobs_by_value_and_presets_by_name() -> None:
    config = sweep_config(["optimization=none,memory_opt", "attention_slicing=false,4"])
    candidates = candidates_of(config, GlobalHydra.instance().config_loader())
    assert [candidate.axes for candidate in candidates] == [
        {"optimization": "none", "attention_slicing": False},
        {"optimization": "none", "attention_slicing": 4},
        {"optimization": "memory_opt", "attention_slicing": False},
        {"optimization": "memory_opt", "attention_slicing": 4},
    ]


def test_repeats_run_round_by_round() -> None:
    config = sweep_config(["precision=fp16,bf16", "repeats=2"])
    add_repeats(config, 2)
    candidates = candidates_of(config, GlobalHydra.instance().config_loader())
    assert [(candidate.repeat, candidate.job.precision) for candidate in candidates] == [
        (0, "fp16"),
        (0, "bf16"),
        (1, "fp16"),
        (1, "bf16"),
    ]
    assert [candidate.axes for candidate in candidates[:2]] == [{"precision": "fp16"}, {"precision": "bf16"}]


def test_an_axis_without_values_is_refused() -> None:
    with pytest.raises(UsageError, match=r"precision=glob\(\*\) gives no value at all"):
        candidates_of(sweep_config(["precision=glob(*)"]), GlobalHydra.instance().config_loader())


def test_a_knob_of_the_whole_sweep_cannot_be_swept() -> None:
    with pytest.raises(UsageError, match="resume holds for a whole sweep"):
        candidates_of(sweep_config(["resume=true,false"]), GlobalHydra.instance().config_loader())


def test_one_wrong_value_stops_the_whole_grid() -> None:
    with pytest.raises(UsageError, match="precision=fp8"):
        candidates_of(sweep_config(["precision=fp16,fp8"]), GlobalHydra.instance().config_loader())


def test_text_that_hydra_cannot_read_is_refused_with_advice() -> None:
    with pytest.raises(UsageError, match="quote a value with commas"):
        parse(["prompt=a(b"])


def test_the_grid_of_another_sweeper_is_not_known() -> None:
    config = sweep_config([])
    assert is_grid(config)
    config.hydra.sweeper["_target_"] = "hydra_plugins.x.OtherSweeper"
    assert not is_grid(config)


def test_a_local_language_model_in_a_folder_is_found_from_the_folder_of_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen").mkdir()
    for given, meant in (
        ("qwen", str(tmp_path / "qwen")),
        ("./gone", str(tmp_path / "gone")),
        ("Org/Name", "Org/Name"),
    ):
        assert job_of(composed([f"prompt_extend_model={given}"])).prompt_extend_model == meant
    service = ["prompt_extend_model=qwen", "prompt_extend_method=dashscope"]
    assert job_of(composed(service)).prompt_extend_model == "qwen"
