"""Says where in the run something happened."""

from wan_sweep.analyze.chrome.forest import NONE
from wan_sweep.analyze.chrome.trace import Trace


class Places:
    """Says where in the run something happened: operation, module, block, step, phase."""

    def __init__(self, trace: Trace) -> None:
        self._trace = trace
        self._operation = trace.forest.nearest(trace.wants_memory())
        self._module = trace.forest.nearest(trace.has_role("module"))
        if (self._module == NONE).all():
            self._module = trace.forest.nearest(trace.has_role("nn_module"))
        self._block = trace.forest.nearest(trace.has_role("block"))

    def operation(self, slice_index: int) -> str:
        """The innermost operation; empty outside all."""
        found = NONE if slice_index == NONE else int(self._operation[slice_index])
        return "" if found == NONE else self._trace.names[int(self._trace.forest.name[found])]

    def module(self, slice_index: int) -> str:
        """The innermost module, or else the block; empty outside all."""
        for nearest in (self._module, self._block):
            found = NONE if slice_index == NONE else int(nearest[slice_index])
            if found != NONE:
                return self._trace.label(int(self._trace.forest.name[found]))
        return ""

    def moment(self, time: float) -> str:
        """Phase and step; empty outside all."""
        return ", ".join(filter(None, (self._trace.phases.label(time), self._trace.steps.label(time))))
