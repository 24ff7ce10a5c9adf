"""A process's place among several, as torchrun tells it in the environment."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which process of how many this is, in all and on its machine; the default is one by itself."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


ALONE = Place()


def read_place(environment: Mapping[str, str] | None = None) -> Place | None:
    """This process's place; None where nobody has started several."""
    variables = os.environ if environment is None else environment
    if not all(variables.get(name) for name in _VARIABLES):
        return None
    return Place(
        rank=int(variables["RANK"]),
        size=int(variables["WORLD_SIZE"]),
        local_rank=int(variables["LOCAL_RANK"]),
        local_size=int(variables.get("LOCAL_WORLD_SIZE") or variables["WORLD_SIZE"]),
    )
