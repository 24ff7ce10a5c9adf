"""What the planner answers for five cards and four workloads: a table of estimates, and commands that test them.

    python scripts/planner_table.py outputs/planner                # asks what is missing, a file each; prints a table
    python scripts/planner_table.py outputs/planner --check RTX4060-8GB/t2v-14B-720p RTX4090-24GB/t2v-14B-480p

With `--check` it prints, for each of these answers, two commands for a larger GPU whose allocator is held to what the
card would leave it: the planner's answer, which has to fit, and of the configurations that it refused though no slower
the smallest whose live tensors alone are more than the card has, which must not. (One that needs more only with what
the allocator keeps unused may get by.) Two answers are asked at a time, each of a process of its own; whatever ends
this loses none that is there, and the same command goes on.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from wan_sweep.cards import card_named
from wan_sweep.environment import Machine
from wan_sweep.estimate.kernel_table import row_for
from wan_sweep.planner.client import ask, margin_of
from wan_sweep.rules import resolve
from wan_sweep.schema import Job, text
from wan_sweep.store import read_json, write_json
from wan_sweep.units import GIB, format_bytes, format_gib, format_seconds

CARDS = ("RTX4060-8GB", "RTX3060-12GB", "RTX4080-16GB", "RTX4090-24GB", "A100-40GB")
WORKLOADS: Mapping[str, Mapping[str, Any]] = {
    "t2v-1.3B-480p": {"model": "t2v-1.3B", "size": "832*480"},
    "t2v-14B-480p": {"model": "t2v-14B", "size": "832*480"},
    "t2v-14B-720p": {"model": "t2v-14B", "size": "1280*720"},
    "i2v-14B-720p": {"model": "i2v-14B", "size": "1280*720"},
}
AT_A_TIME = 2
SHORT = "mode=measure sample_steps=2 save_video=false fidelity=false track=false name=planner_check"


def answer(folder: Path, card_name: str, workload: str) -> dict[str, Any]:
    """What the planner says, from its file, or asked now."""
    path = folder / f"{card_name}_{workload}.json"
    if path.exists():
        return read_json(path)
    started = time.monotonic()
    card = card_named(card_name)
    job = resolve(
        Job(mode="estimate", card=card_name, precision="bf16", kernels="auto").replace(**WORKLOADS[workload]), Machine()
    ).job
    margin = margin_of(card.device_bytes)
    said = ask(job, card, vram_bytes=card.device_bytes, margin_bytes=margin, say=lambda _: None)
    num_seen = len(said["others"]) + len(said["refused"]) + (said["best"] is not None)
    took = format_seconds(time.monotonic() - started)
    sys.stderr.write(f"{card_name} {workload}: {num_seen} estimates, {took}\n")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, said)
    return said


def words_of(knobs: Mapping[str, Any]) -> str:
    """Knobs as on a command line."""
    return " ".join(f"{name}={text(value)}" for name, value in knobs.items())


def table(answers: Mapping[tuple[str, str], Mapping[str, Any]]) -> list[str]:
    """A row for each answer, and rows of what is beside it."""
    lines = [
        "| card | workload | | knobs | needs GiB | limited by | host GiB | at least |",
        "| --- | --- | --- | --- | --: | --- | --: | --: |",
    ]
    for (card_name, workload), said in answers.items():
        best, refused = said["best"], nearest(said)
        rows = [] if best is None else [("fastest", best), *(("runner-up", one) for one in said["others"][:1])]
        rows += [] if refused is None else [("refused", refused)]
        head = f"| {card_name}, {format_gib(card_named(card_name).device_bytes)} GiB | {workload} "
        if best is None:
            lines.append(f"{head}| nothing | | | | | |")
            head = "| | "
        for mark, one in rows:
            phase = one["limited_by"].partition(" needs most")[0]
            host, seconds = format_gib(one["pinned_bytes"]), format_seconds(one["least_seconds"])
            words = words_of(one["knobs"]) or "no saving"
            lines.append(
                f"{head}| {mark} | {words} | {format_gib(one['needed_bytes'])} | {phase} | {host} | {seconds} |"
            )
            head = "| | "
    return lines


def _no_slower(said: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What was refused for its size though its lower bound of time is no higher than that of the answer."""
    slowest = float("inf") if said["best"] is None else said["best"]["least_seconds"]
    return [one for one in said["refused"] if one["needed_bytes"] and one["least_seconds"] <= slowest]


def nearest(said: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Of these the smallest."""
    return min(_no_slower(said), key=lambda one: int(one["needed_bytes"]), default=None)


def too_large(card_name: str, said: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Of these the smallest that must run out of memory on the card."""
    card_bytes = card_named(card_name).device_bytes
    larger = [one for one in _no_slower(said) if one["allocated_bytes"] > card_bytes]
    return min(larger, key=lambda one: int(one["allocated_bytes"]), default=None)


def commands(card_name: str, workload: str, said: Mapping[str, Any]) -> list[str]:
    """Of the answer, and of what was refused: on a GPU whose allocator gets no more than on the card."""
    card = card_named(card_name)
    limit = (card.device_bytes - row_for(card)[0].context_bytes) / GIB
    lines = []
    for one, expected in ((said["best"], "fits"), (too_large(card_name, said), "does not fit")):
        if one is not None:
            knobs = {
                **WORKLOADS[workload],
                "precision": "bf16",
                "kernels": "fused",
                **one["knobs"],
                "memory_limit_gib": round(limit, 3),
            }
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
        questions = list(product(CARDS, WORKLOADS))
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            answers = pool.map(lambda question: answer(asked.folder, *question), questions)
        lines = table(dict(zip(questions, answers, strict=True)))
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
