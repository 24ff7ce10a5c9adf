"""The flags, and the page that lists them."""

import argparse
import re
from pathlib import Path

import pytest

from wan21.flags import asked, parser, paths, slices, truth
from wan21.models import MODELS

PAGE = Path(__file__).parents[2] / "docs" / "generating.md"
OFFICIAL = {
    "task": "t2v-14B",
    "frame_num": None,
    "ulysses_size": 1,
    "ring_size": 1,
    "t5_fsdp": False,
    "t5_cpu": False,
    "dit_fsdp": False,
    "save_file": None,
    "src_video": None,
    "src_mask": None,
    "prompt": None,
    "use_prompt_extend": False,
    "prompt_extend_method": "local_qwen",
    "prompt_extend_model": None,
    "prompt_extend_target_lang": "zh",
    "base_seed": -1,
    "sample_solver": "unipc",
    "sample_steps": None,
    "sample_shift": None,
    "offload_model": True,
}


def actions() -> list[argparse.Action]:
    return [action for action in parser()._actions if action.dest != "help"]


def row(action: argparse.Action) -> str:
    """A line of the page's table."""
    flag = action.option_strings[0]
    if action.choices:
        takes = ", ".join(map(str, action.choices))
    elif action.nargs == 0:
        takes = "(a switch)"
    else:
        takes = {int: "whole number", float: "number", truth: "true or false", slices: "true, false or number"}.get(
            action.type,  # type: ignore[call-overload]  # argparse's callables, looked up as values
            "PATH,PATH" if action.type is paths else "text",
        )
    default = "required" if action.required else "" if action.default in {None, ()} else f"`{action.default}`"
    return f"| `{flag}` | {takes} | {'' if action.nargs == 0 else default} | {action.help} |"


def test_the_page_lists_every_flag_as_it_is() -> None:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `--")]
    assert lines == [row(action) for action in actions()]


def test_the_page_has_a_command_for_every_model() -> None:
    commands = re.findall(r"generate\.py .*--task (\S+)", PAGE.read_text(encoding="utf-8"))
    assert set(commands) == {name for name in MODELS if not name.startswith("tiny")} | {"tiny"}


@pytest.mark.parametrize(("name", "default"), OFFICIAL.items())
def test_defaults_are_the_official_ones(name: str, default: object) -> None:
    assert getattr(parser().parse_args(["--ckpt_dir", "x"]), name) == default


def test_pictures_are_separated_by_commas() -> None:
    assert paths("a.png, b/c.png") == ("a.png", "b/c.png")
    with pytest.raises(argparse.ArgumentTypeError, match="empty path"):
        paths("a.png,,b.png")


def test_a_folder_that_cannot_be_written_is_refused_before_anything_starts(tmp_path: Path) -> None:
    flags = ["--task", "tiny", "--ckpt_dir", "random", "--save_file"]
    (tmp_path / "out.mp4").mkdir()
    for path, words in ((tmp_path / "out.mp4", "is a folder"), (tmp_path / "no" / "out.mp4", "make it first")):
        with pytest.raises(ValueError, match=words):
            asked(parser().parse_args([*flags, str(path)]))
