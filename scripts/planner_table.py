"""What the planner answers for five cards and four workloads: a table of estimates, and commands that test them.

    python scripts/planner_table.py outputs/planner                # asks what is missing, a file each; prints a table
    python scripts/planner_table.py outputs/planner --check RTX4060-8GB/t2v-14B-720p RTX4090-24GB/t2v-14B-480p

With `--check` it prints, for each of these answers, two commands for a larger GPU whose allocator is held to what the
card would leave it: the planner's answer, which has to fit, and the smallest that it refused for being larger than the
card though no slower, which must not. An answer takes minutes; whatever ends this loses none, and the same command
goes on.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan_sweep.cards import card_named
from wan_sweep.environment import Machine
from wan_sweep.estimate.kernel_table import row_for
from wan_sweep.planner.client import ask, margin_of
from wan_sweep.rules import resolve
from wan_sweep.schema import Job, text
from wan_sweep.store import read_json, write_json
from wan_sweep.units import GIB, format_bytes, format_seconds

CARDS = ("RTX4060-8GB", "RTX3060-12GB", "RTX4080-16GB", "RTX4090-24GB", "A100-40GB")
WORKLOADS: Mapping[str, Mapping[str, Any]] = {
    "t2v-1.3B-480p": {"model": "t2v-1.3B", "size": "832*480"},
    "t2v-14B-480p": {"model": "t2v-14B", "size": "832*480"},
    "t2v-14B-720p": {"model": "t2v-14B", "size": "1280*720"},
    "i2v-14B-720p": {"model": "i2v-14B", "size": "1280*720"},
}
SHORT = "mode=measure sample_steps=2 save_video=false fidelity=false track=false name=planner_check"


def answer(folder: Path, card_name: str, workload: str) -> dict[str, Any]:
    """What the planner says, from its file, or asked now."""
    path = folder / f"{card_name}_{workload}.json"
    if path.exists():
        return read_json(path)
    card = card_named(card_name)
    job = resolve(Job(mode="estimate", card=card_name, precision="bf16").replace(**WORKLOADS[workload]), Machine()).job
    sys.stderr.write(f"{card_name} {workload}\n")
    margin = margin_of(card.device_bytes)
    said = ask(job, card, vram_bytes=card.device_bytes, margin_bytes=margin, say=_say)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, said)
    return said


def _say(words: str) -> None:
    sys.stderr.write(f"  {words}\n")


def words_of(knobs: Mapping[str, Any]) -> str:
    """Knobs as on a command line."""
    return " ".join(f"{name}={text(value)}" for name, value in knobs.items())


def table(answers: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """A row for each answer."""
    lines = [
        "| card | workload | fastest that fits | needs | of | at least | refused: the smallest that is faster |",
        "| --- | --- | --- | --: | --: | --: | --- |",
    ]
    for (card_name, workload), said in answers.items():
        best, card = said["best"], format_bytes(card_named(card_name).device_bytes)
        refused = too_large(card_name, said)
        beyond = f"{words_of(refused['knobs'])}: {format_bytes(refused['needed_bytes'])}" if refused else ""
        if best is None:
            lines.append(f"| {card_name} | {workload} | nothing | | {card} | | {beyond} |")
            continue
        lines.append(
            f"| {card_name} | {workload} | {words_of(best['knobs']) or 'no saving'} | "
            f"{format_bytes(best['needed_bytes'])} | {card} | {format_seconds(best['least_seconds'])} | {beyond} |"
        )
    return lines


def too_large(card_name: str, said: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Of what was refused and is larger than the whole card, the smallest that is no slower than the answer."""
    card_bytes = card_named(card_name).device_bytes
    best = said["best"]
    slowest = float("inf") if best is None else best["least_seconds"]
    larger = [one for one in said["refused"] if one["needed_bytes"] > card_bytes and one["least_seconds"] <= slowest]
    return min(larger, key=lambda one: int(one["needed_bytes"]), default=None)


def commands(card_name: str, workload: str, said: Mapping[str, Any]) -> list[str]:
    """Of the answer, and of what was refused: on a GPU whose allocator gets no more than on the card."""
    card = card_named(card_name)
    limit = (card.device_bytes - row_for(card)[0].context_bytes) / GIB
    lines = []
    for one, expected in ((said["best"], "fits"), (too_large(card_name, said), "does not fit")):
        if one is not None:
            knobs = {**WORKLOADS[workload], "precision": "bf16", **one["knobs"], "memory_limit_gib": round(limit, 3)}
            asked = shlex.join(["python", "-m", "wan_sweep", *SHORT.split(), *words_of(knobs).split()])
            lines.append(f"{asked}  # {expected}: {card_name}, {format_bytes(one['needed_bytes'])}")
    return lines


def main() -> int:
    """Asks, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the answers")
    parser.add_argument("--check", nargs="+", default=[], metavar="CARD/WORKLOAD", help="print commands for these")
    asked = parser.parse_args()
    if asked.check:
        lines = []
        for one in asked.check:
            card_name, _, workload = one.partition("/")
            lines += commands(card_name, workload, answer(asked.folder, card_name, workload))
    else:
        lines = table({(card, load): answer(asked.folder, card, load) for card in CARDS for load in WORKLOADS})
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
