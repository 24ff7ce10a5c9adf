"""Goes through a tile of each kind and few of its frames: what the others take is what these took, event by event.

Letters: t latent frames.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from wan21.vae.plan import DecodePlan, Tile
from wan_sweep.estimate.memory import Consider, DeviceMemory, Event, Give, Holding, Take

MOST_FRAMES = 20
"""From the third on the layers' pasts are as long as ever; from some twentieth on tensors lie where they will."""

Born = tuple[int, int]
"""A holding by when it began: so many frames ago, as the so many-th of its frame."""


@dataclass(frozen=True, slots=True)
class _Begun:
    stream: int
    holding: Holding


@dataclass(frozen=True, slots=True)
class _Frame:
    """What happened in a frame, in words that hold for any.

    Attributes:
        happened: holdings that began, some that ended, and what a kernel may take, in order; None for the end of a
            holding that is older than all frames, which cannot happen again.
        stays: the holdings of frames that are there at its end, with their numbers.
        numbers: of the holdings that began in it.
    """

    happened: tuple[_Begun | Born | Consider | None, ...]
    stays: Mapping[Born, int]
    numbers: list[int]

    def is_like(self, before: "_Frame") -> bool:
        """Whether it did the same as the one before and left the same, or such as that: then so will the next."""
        if None in self.happened or self.happened != before.happened:
            return False
        renewed = self.renewed(before)
        mine, theirs = ({number for born, number in one.stays.items() if born not in renewed} for one in (self, before))
        return mine == theirs

    def renewed(self, before: "_Frame") -> set[Born]:
        """What it left in place of what the one before had left; the rest stays as it is."""
        renewed = set(self.stays.keys() & before.stays.keys())
        while True:
            stay = {number for born, number in self.stays.items() if born not in renewed}
            replaced = {born for born in renewed if before.stays[born] not in stay}
            if replaced == renewed:
                return renewed
            renewed = replaced


@dataclass(slots=True)
class Frames:
    """Runs the first frames, and from one that did as the one before on repeats what it did, up to the last but one.

    One loop over the frames leads; others that are gone through in step with it follow.
    """

    memory: DeviceMemory
    _here: int | None = None
    _history: list[_Frame] = field(default_factory=list)
    _alive: dict[int, tuple[int, int]] = field(default_factory=dict)

    def through(self, numbers: Sequence[int]) -> Iterator[int]:
        """The numbers of the frames to run, each of which ends when the next is asked for."""
        yield from self._lead(numbers) if self._here is None else self._follow(numbers[-1])

    def _follow(self, last: int) -> Iterator[int]:
        here = None
        while self._here is not None and here != last:
            here = self._here
            yield here

    def _lead(self, numbers: Sequence[int]) -> Iterator[int]:
        events: list[Event] = []
        listener = events.append
        self._history, self._alive = [], {}
        self.memory.listeners.append(listener)
        try:
            while len(self._history) < len(numbers):
                self._here = numbers[len(self._history)]
                yield self._here
                self._history.append(self._told(events))
                events.clear()
                if len(self._history) > 1 and self._history[-1].is_like(self._history[-2]):
                    self._repeat(len(numbers) - 1 - len(self._history))
                    events.clear()
        finally:
            self._here = None
            self.memory.listeners.remove(listener)

    def _told(self, events: Iterable[Event]) -> _Frame:
        """The events of the frame that has just ended; keeps account of what is alive."""
        here, alive = len(self._history), self._alive
        happened: list[_Begun | Born | Consider | None] = []
        numbers: list[int] = []
        for event in events:
            if isinstance(event, Take):
                happened.append(_Begun(event.stream, event.holding))
                alive[event.number] = (here, len(numbers))
                numbers.append(event.number)
            elif isinstance(event, Give):
                born = alive.pop(event.number, None)
                happened.append(None if born is None else (here - born[0], born[1]))
            else:
                happened.append(event)
        stays = {(here - frame, at): number for number, (frame, at) in alive.items()}
        return _Frame(tuple(happened), stays, numbers)

    def _repeat(self, times: int) -> None:
        """Does the last frame so many times again; its tensors then stand for those of the last repetition."""
        if times <= 0:
            return
        memory, like, outer_stream = self.memory, self._history[-1], self.memory.stream
        renewed = {born: like.stays[born] for born in like.renewed(self._history[-2])}
        for _ in range(times):
            numbers: list[int] = []
            self._history.append(_Frame(like.happened, like.stays, numbers))
            for one in like.happened:
                if isinstance(one, _Begun):
                    memory.stream = one.stream
                    numbers.append(memory.take(one.holding))
                elif isinstance(one, Consider):
                    memory.consider(one.num_bytes)
                elif one is not None:
                    memory.give(self._number(one))
        memory.stream = outer_stream
        memory.rename({self._number(born): number for born, number in renewed.items()})
        here = len(self._history) - 1
        self._alive |= {number: (here - ago, at) for (ago, at), number in renewed.items()}

    def _number(self, born: Born) -> int:
        """The holding's number, seen from the last frame."""
        ago, at = born
        return self._history[-1 - ago].numbers[at]


@dataclass(frozen=True, kw_only=True)
class Shortened(DecodePlan):
    """A plan that goes through a tile of each kind, the first latent frames of it and the last one.

    Frames between allocate what the third does, and tiles of one kind all the same. But where tensors lie settles only
    after many frames, so all of 81 frames' latents are gone through, and of longer videos as many and the last.

    frames: runs some of these and repeats the rest; None runs all.
    """

    frames: Frames | None = None

    def latent_frames(self, num_frames: int) -> Iterable[int]:
        first = range(min(num_frames, MOST_FRAMES))
        numbers = first if num_frames <= MOST_FRAMES else (*first, num_frames - 1)
        return numbers if self.frames is None else self.frames.through(numbers)

    def tiles(self, every: Iterable[Tile]) -> Iterable[Tile]:
        seen = set()
        for tile in every:
            crops, layers = tile.crops(), tile.rows.windows
            kind = (
                *(len(side) for side in (tile.rows.features, tile.cols.features, tile.rows.pixels, tile.cols.pixels)),
                *(str(crops.of(layer)) for layer in layers),
            )
            if kind not in seen:
                seen.add(kind)
                yield tile
