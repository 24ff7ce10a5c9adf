"""What a user types wrong: exit code 2, one screen, the value, the rule and the way out; never a traceback."""

from pathlib import Path

import pytest

from tests.conftest import Command, fits_one_screen
from wan_sweep.cli import check, config_folder
from wan_sweep.errors import UsageError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("precison=fp16", "there is no knob precison; did you mean precision?\nKnobs: model, ckpt_dir"),
        ("zebra=9", "there is no knob zebra."),
        ("offload.x=1", "there is no knob offload.x; did you mean offload?"),
        ("repeat=1", "there is no knob repeat; did you mean repeats?"),
        ("+precison=1", "there is no knob precison; did you mean precision?"),
        ("model=tinny", "model=tinny is not known; did you mean tiny?\nChoose auto, "),
        ("-m model=tiny,t2v-1.3b", "model=t2v-1.3b is not known; did you mean t2v-1.3B?"),
        (
            "optimization=all",
            "optimization=all is not known\nChoose balanced, fastest, fastest_fp8, lowest_memory, memory_opt, none",
        ),
        ("+experiment=base", "experiment=base is not known"),
        ("experiment=baseline", "write +experiment=baseline"),
        ("-m +experiment=baseline,memory_opt", "experiment=baseline,memory_opt lists several experiments"),
        ("+precision=fp16", "write precision=fp16 without the +"),
        ("precision=fp16,bf16", "precision=fp16,bf16 lists several values; add -m"),
        ("prompt=a(b", "prompt=a(b cannot be read: write key=value"),
        ("hello", "hello cannot be read"),
    ],
)
def test_what_was_typed_is_checked_before_hydra_starts(arguments: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        check(arguments.split(" "))
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    "arguments",
    [
        "precision=fp16",
        "-m precision=fp16,bf16 model=glob(*)",
        "-m frame_num=range(1,10,4)",
        "++precision=bf16",
        "hydra.verbose=true hydra/launcher=basic",
        "+experiment=memory_opt precision=fp16,bf16",
        "--help",
        "--cfg job",
    ],
)
def test_what_hydra_can_do_passes_the_check(arguments: str) -> None:
    check(arguments.split(" "))


def test_presets_of_a_folder_of_ones_own_are_known(tmp_path: Path) -> None:
    (tmp_path / "optimization").mkdir()
    (tmp_path / "optimization" / "mine.yaml").write_text("# @package _global_\noffload: true\n")
    check(["--config-dir", str(tmp_path), "optimization=mine"])


def test_the_configuration_is_found_beside_the_package(repository: Path) -> None:
    assert repository / "conf" == config_folder()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("precision=fp8", "precision=fp8 cannot be: choose fp16, bf16 or fp32"),
        ("precison=fp16", "there is no knob precison; did you mean precision?"),
        ("model=t2v-1.3B size=100*100", "size=100*100 is not a size of t2v-1.3B; choose 480*832, 832*480"),
        ("-m precision=fp16,bf16 frame_num=80", "frame_num=80 is not of the form 4n+1, which the VAE needs; choose 77"),
        (
            "model=t2v-1.3B ulysses_size=5",
            "num_heads=12 of t2v-1.3B is not divisible by ulysses_size=5; choose 1, 2, 3, 4, 6 or 12",
        ),
        ("t5_fsdp=true", "t5_fsdp=true shards weights over ranks, and there is one; choose ulysses_size"),
        (
            "-m ckpt_dir=/no/such/folder precision=fp16,bf16",
            "ckpt_dir=/no/such/folder does not exist; give the official",
        ),
        ("-m precision=glob(*)", "precision=glob(*) gives no value at all"),
        ("-m plan=true,false", "plan holds for a whole sweep and cannot be swept"),
        ("output_root=/proc/none", "0 B free for /proc/none"),
    ],
)
def test_a_mistake_ends_with_code_2_on_one_screen(
    wan_sweep: Command, tmp_path: Path, arguments: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    done = wan_sweep(*arguments.split(" "))
    assert done.returncode == 2
    assert message in done.stderr
    shown = done.stdout + done.stderr
    assert "Traceback" not in shown
    assert "HYDRA_FULL_ERROR" not in shown
    assert fits_one_screen(shown)
    assert list(tmp_path.iterdir()) == []
