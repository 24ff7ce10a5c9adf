"""The command line, from a checkpoint folder in the official layout to a file."""

import subprocess
import sys
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from wan21.generate import main, parser
from wan21.models import model_spec
from wan21.options import Options
from wan21.runtime import CpuRuntime
from wan21.weights.random import RandomWeights
from wan21.weights.write import write_folder

SCRIPT = Path(__file__).parents[2] / "Wan2.1" / "generate.py"
QUICK = ["--task", "tiny", "--size", "96*64", "--frame_num", "5", "--sample_steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "Wan2.1-tiny"
    spec = model_spec("tiny")
    write_folder(path, spec, RandomWeights(spec, 0, CpuRuntime().generator))
    return path


def test_a_prompt_becomes_an_mp4(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kite.mp4"
    flags = ["--ckpt_dir", str(folder), "--prompt", "a red kite", "--base_seed", "3", "--save_file", str(out)]
    assert main([*QUICK, *flags]) == 0
    decode = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-i",
        str(out),
        "-f",
        "rawvideo",
        "-pix_fmt",
        "rgb24",
        "-",
    ]
    pixels = subprocess.run(decode, check=True, capture_output=True).stdout
    frames = np.frombuffer(pixels, np.uint8).reshape(-1, 64, 96, 3)
    assert len(frames) == 5
    assert frames.std() > 5
    assert [path.name for path in tmp_path.iterdir()] == ["kite.mp4"]
    shown = capsys.readouterr().out
    assert "seed 3" in shown
    assert "denoise" in shown


def test_the_script_runs_from_any_folder_without_being_installed(folder: Path, tmp_path: Path) -> None:
    flags = ["--ckpt_dir", str(folder), "--save_file", "out.mp4", "--load_strategy", "block"]
    command = [sys.executable, "-I", "-X", "importtime", str(SCRIPT), *QUICK, *flags]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.mp4").stat().st_size > 1000
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "wan21.components" in imported
    assert "torch.distributed.fsdp" not in imported  # a process alone does not wait for what shards weights


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--frame_num", "80"], ["frame_num=80", "4n+1", "77 or 81"]),
        (["--size", "100*100"], ["size=100*100", "tiny", "160*96"]),
        (["--sample_steps", "0"], ["sample_steps=0", "1 to 1000"]),
        (["--ckpt_dir", "/nowhere"], ["/nowhere"]),
        (["--save_file", "out.png"], ["out.png", ".mp4"]),
        (["--save_file", "/nowhere/out.mp4"], ["/nowhere", "make it first"]),
        (["--ulysses_size", "2"], ["ulysses_size=2 needs 2 processes and there are 1", "torchrun --nproc-per-node=2"]),
        (["--dit_fsdp"], ["dit_fsdp=true", "there is one", "ulysses_size, ring_size or cfg_parallel"]),
        (["--device", "tpu"], ["device=tpu", "cuda"]),
        (["--device", "cuda:9"], ["cuda:9", "device=cpu"]),
    ],
)
def test_bad_input_is_one_sentence_with_the_way_out(
    flags: list[str], words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base = ["--task", "tiny", "--ckpt_dir", "random", "--save_file", str(tmp_path / "out.mp4")]
    code = main([*base, *flags])
    message = capsys.readouterr().err
    assert code in {2, 3}
    assert message.count("\n") == 1
    for word in words:
        assert word in message


@pytest.mark.parametrize("flags", [["--offload_model", "perhaps"], ["--task", "t2v-2B"], ["--attention_slicing", "-1"]])
def test_words_that_no_flag_takes_are_refused_by_argparse(flags: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["--ckpt_dir", "random", *flags])
    assert refused.value.code == 2


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), ["2.00 GiB", "--load_strategy block"]),
        (OSError(28, "No space left on device", "out.mp4"), ["out.mp4", "No space left"]),
    ],
)
def test_what_goes_wrong_on_the_way_is_one_sentence_too(
    error: Exception, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("wan21.generate.generate_to", fail)
    assert main(["--task", "tiny", "--ckpt_dir", "random", "--save_file", "out.mp4"]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for word in words:
        assert word in message


def test_truth_is_written_in_many_ways() -> None:
    for word, meant in (("Yes", True), ("t", True), ("1", True), ("NO", False), ("f", False), ("0", False)):
        assert parser().parse_args(["--ckpt_dir", "x", "--offload_model", word]).offload_model is meant


def test_defaults_are_those_of_the_task() -> None:
    flags = parser().parse_args(["--ckpt_dir", "x"])
    assert flags.task == "t2v-14B"
    assert flags.sample_guide_scale is None
    assert (flags.ulysses_size, flags.ring_size, flags.t5_fsdp, flags.dit_fsdp) == (1, 1, False, False)
    assert Options().precision == "fp16"
    assert flags.precision == "bf16"
