"""The child that plans: a question on standard input, lines of JSON on standard output; the last one is the answer."""

import dataclasses
import json
import sys
from typing import Any

from wan_sweep.cards import card_named
from wan_sweep.errors import UsageError
from wan_sweep.estimate.kernel_table import row_for
from wan_sweep.estimate.predict import estimate
from wan_sweep.planner.search import Found, Search
from wan_sweep.schema import Job

ROOM_FOR_EVERYTHING_BYTES = 1 << 50


def tell(values: dict[str, Any]) -> None:
    """Writes a line."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """Searches."""
    card = card_named(question["card"])
    # An estimate says what is needed; whether that fits is judged by the search, so it need not be gone through twice.
    roomy = dataclasses.replace(card, device_bytes=ROOM_FOR_EVERYTHING_BYTES)
    search = Search(
        card,
        vram_bytes=question["vram_bytes"],
        margin_bytes=question["margin_bytes"],
        context_bytes=row_for(card)[0].context_bytes,
        estimate=lambda job: estimate(job, roomy),
        say=lambda words: tell({"said": words}),
    )
    job = Job.from_dict(question["job"])
    largest = search.largest(job, question["largest"]) if question["largest"] else job
    if largest is None:
        return Found(best=None, others=(), refused=(), workload={}).to_json()
    return search.fastest(largest).to_json()


def main() -> None:
    """Answers, or tells why there is no answer."""
    try:
        tell(answer(json.loads(sys.stdin.read())))
    except UsageError as error:
        tell({"refusal": str(error)})


if __name__ == "__main__":
    main()
