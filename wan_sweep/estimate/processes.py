"""Work that is shared out among processes, without waiting for each to import torch again."""

import multiprocessing
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import TypeVar

from wan_sweep.parent import die_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")


def shared_out(
    work: Callable[[Sequence[Item]], Mapping[Item, Result]], items: Sequence[Item], num_processes: int
) -> dict[Item, Result]:
    """What `work` makes of all items.

    The first of them is worked on here. On Linux the others are dealt out to this process and to forks of it, which
    begin with all that is here already: no other thread may run, as it would be missing there, with what it holds.
    Elsewhere all are worked on here, one after the other.

    Args:
        work: from some of the items to what it makes of each; that has to pass through a pipe.
        items: in the order of the results.
        num_processes: so many at the most.

    Raises:
        RuntimeError: a fork ended without its results.
    """
    size = max(1, min(num_processes, len(items))) if sys.platform == "linux" else 1
    shares = [items[first::size] for first in range(size)]
    forks = [_Fork(work, share) for share in shares[1:]]
    try:
        made = dict(work(shares[0]))
        for fork in forks:
            made |= fork.results()
    finally:
        for fork in forks:
            fork.end()
    return {item: made[item] for item in items}


class _Fork:
    """A process that works on its share from now on."""

    def __init__(self, work: Callable[[Sequence[Item]], Mapping[Item, Result]], share: Sequence[Item]) -> None:
        context = multiprocessing.get_context("fork")
        self._share = share
        self._answer, answer = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(work, share, answer))
        self._process.start()
        answer.close()  # or nobody would notice that the process is gone

    def results(self) -> Mapping[Item, Result]:
        try:
            results: Mapping[Item, Result] = self._answer.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"the process for {', '.join(map(str, self._share))} ended with {self._process.exitcode} and without a "
                "result; what it said stands in the log. If memory was short, estimate one job at a time"
            ) from None
        return results

    def end(self) -> None:
        self._process.kill()  # nothing, if it has ended
        self._process.join()
        self._answer.close()


def _work(work: Callable[[Sequence[Item]], Mapping[Item, Result]], share: Sequence[Item], answer: Connection) -> None:
    die_with_parent()
    answer.send(dict(work(share)))
