"""What operations, modules and annotations cost, as sections."""

from collections.abc import Sequence

from wan_sweep.analyze.chrome.collect import ANNOTATION, OP, RUNTIME
from wan_sweep.analyze.chrome.costs import Cost, costs
from wan_sweep.analyze.chrome.forest import NONE
from wan_sweep.analyze.chrome.memory import DeviceMemory
from wan_sweep.analyze.chrome.trace import Trace
from wan_sweep.analyze.finding import Column, Section, Table, Value, top_table

NO_OPERATIONS = "this trace has no operations of the CPU: record with ProfilerActivity.CPU among the activities"
NO_MODULES = (
    'this trace names no modules: record with with_stack=True, or mark them with record_function("module:NAME")'
)

_COST_COLUMNS = (
    Column(key="calls", title="calls", unit="count", rank=5),
    Column(key="device_self_seconds", title="device self", unit="seconds", rank=8),
    Column(key="device_total_seconds", title="device total", unit="seconds", rank=6),
    Column(key="cpu_self_seconds", title="CPU self", unit="seconds", rank=8),
    Column(key="cpu_total_seconds", title="CPU total", unit="seconds", rank=6),
    Column(key="allocated_self_bytes", title="allocated self", unit="bytes", rank=5),
    Column(key="allocated_total_bytes", title="allocated total", unit="bytes", rank=3),
    Column(key="live_at_peak_bytes", title="live at peak", unit="bytes", rank=4),
    Column(key="phase", title="in", rank=7),
    Column(key="name", title="name", rank=9),
)


def _cost_tables(found: Sequence[Cost], trace: Trace, memory: DeviceMemory | None, top: int) -> list[Table]:
    """The same rows twice: by time and by memory."""
    on_device = len(trace.activities) > 0

    def row(cost: Cost) -> tuple[Value, ...]:
        device = (cost.device_self, cost.device_total) if on_device else (None, None)
        known = (cost.allocated_self, cost.allocated_total, cost.live_at_peak)
        in_memory = known if memory is not None else (None, None, None)
        return (cost.calls, *device, cost.host_self, cost.host_total, *in_memory, cost.phase or None, cost.name)

    by_time = sorted(found, key=lambda cost: (-cost.device_self, -cost.host_self))
    tables = [top_table("by_time", "By time", _COST_COLUMNS, [row(cost) for cost in by_time], top=top)]
    allocating = sorted((cost for cost in found if cost.allocated_total), key=lambda cost: -cost.allocated_self)
    if allocating and memory is not None:
        title = f"By memory of {memory.device}"
        tables.append(top_table("by_memory", title, _COST_COLUMNS, [row(cost) for cost in allocating], top=top))
    return tables


def operations_section(trace: Trace, memory: DeviceMemory | None, top: int) -> tuple[Section, list[Cost]]:
    """Operations and calls of the runtime."""
    is_operation = trace.is_kind(OP)
    is_call = trace.is_kind(RUNTIME)
    # A launch outside all operations, as of kernels that were written by hand, is put down to the call itself.
    is_alone = is_call & (trace.forest.nearest(is_operation) == NONE)
    found = costs(
        trace,
        is_operation | is_call,
        memory,
        launching=is_operation | is_alone,
        allocating=trace.wants_memory(),
    )
    if not found:
        return Section(key="operations", title="Operations", missing=NO_OPERATIONS), []
    return Section(key="operations", title="Operations", tables=_cost_tables(found, trace, memory, top)), found


def modules_section(trace: Trace, memory: DeviceMemory | None, top: int) -> Section:
    """Modules, and blocks where they are marked."""
    is_module = trace.has_role("module")
    if not is_module.any():
        is_module = trace.has_role("nn_module")
    is_module |= trace.has_role("block")
    found = costs(trace, is_module, memory, launching=is_module, allocating=is_module, is_by_phase=True)
    if not found:
        return Section(key="modules", title="Modules", missing=NO_MODULES)
    return Section(key="modules", title="Modules", tables=_cost_tables(found, trace, memory, top))


def annotations_section(trace: Trace, memory: DeviceMemory | None, top: int) -> Section:
    """Ranges with names of their own."""
    named = trace.has_role("phase", "step", "profiler_step", "block", "module")
    chosen = trace.is_kind(ANNOTATION) & ~named
    found = costs(trace, chosen, memory, launching=chosen, allocating=chosen)
    if not found:
        return Section(
            key="annotations", title="Other annotations", missing="this trace has no annotations but those above"
        )
    return Section(key="annotations", title="Other annotations", tables=_cost_tables(found, trace, memory, top)[:1])
