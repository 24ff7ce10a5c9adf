"""Modules whose weights are used in parts, one after another, so that a part has to be there only while it is used.

Who brings weights in tells the module how its parts are entered and left; without anybody all of them are there.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

from torch import nn

Enter = Callable[[str], AbstractContextManager[object]]
"""From a part's name to what surrounds its use."""


def _is_there(name: str) -> AbstractContextManager[object]:  # noqa: ARG001 # every part is
    return nullcontext()


class InParts(nn.Module):
    """A module that says which weights it is about to use.

    PARTS: names of submodules and parameters by part, in the order of use. While a part is in use the next one may be
        entered, but not the one after it.
    BESIDE: parts that are brought in beside the one before them: the use of one of the two is too short for the next
        part to come meanwhile, or they are in use together.
    ALWAYS: names of small ones that are there always. Every other parameter lies in exactly one part.
    """

    PARTS: ClassVar[Mapping[str, tuple[str, ...]]]
    BESIDE: ClassVar[frozenset[str]] = frozenset()
    ALWAYS: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        super().__init__()
        self._enter: Enter = _is_there

    def part(self, name: str) -> AbstractContextManager[object]:
        """What has to surround the use of a part's weights."""
        return self._enter(name)

    def enter_with(self, enter: Enter) -> None:
        """From now on parts are entered in this way."""
        self._enter = enter

    def part_parameters(self) -> dict[str, dict[str, nn.Parameter]]:
        """Parameters by part and name; those that are there always under an empty name.

        Raises:
            ValueError: a parameter lies in no part, or in several.
        """
        owners_by_part = {"": self.ALWAYS, **self.PARTS}
        by_part: dict[str, dict[str, nn.Parameter]] = {part: {} for part in owners_by_part}
        for name, parameter in self.named_parameters():
            parts = [
                part
                for part, owners in owners_by_part.items()
                if any(f"{name}.".startswith(f"{owner}.") for owner in owners)
            ]
            if len(parts) != 1:
                raise ValueError(
                    f"parameter {name} of {type(self).__name__} lies in parts {parts}; it needs exactly one"
                )
            by_part[parts[0]][name] = parameter
        return by_part


def all_in_parts(blocks: Iterable[nn.Module]) -> list[InParts]:
    """The blocks of a network, all of which have to be in parts.

    Raises:
        TypeError: names the first that is not.
    """
    found = []
    for index, block in enumerate(blocks):
        if not isinstance(block, InParts):
            raise TypeError(f"block {index} is a {type(block).__name__}, which has no parts; derive it from InParts")
        found.append(block)
    return found
