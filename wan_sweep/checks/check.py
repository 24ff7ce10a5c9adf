"""What a check says."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "warning", "refused"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing about the machine or its software that measuring depends on.

    Attributes:
        name: What was looked at.
        state: Whether to measure: yes, yes but mind the text, or no.
        text: What was found.
        advice: What to do about it; empty if nothing need be done.
    """

    name: str
    state: State = "ok"
    text: str
    advice: str = ""

    def to_dict(self) -> dict[str, str]:
        """As it stands in plan and record."""
        return dataclasses.asdict(self)
