"""A plan as text: what will run, and why the rest will not."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from wan_sweep.plan import Plan, PlannedJob
from wan_sweep.report.sheet import shortened
from wan_sweep.report.text_table import CELL_WIDTHS, broken
from wan_sweep.schema import text

_WORDS = {"run": ("run", "green"), "duplicate": ("duplicate", "dim"), "refused": ("refused", "yellow")}
_DONE = ("done before", "cyan")
_GAP = 3


def print_plan(plan: Plan, console: Console) -> None:
    """Prints head, notes, a row for each combination, and each reason on a line of its own."""
    console.print(Text(f"sweep {plan.name} {plan.id}: {_summary(plan)}"), soft_wrap=True)
    for line in filter(None, [plan.description, *plan.notes]):
        console.print(Text(line), soft_wrap=True)
    if plan.jobs:
        console.print(_table(plan, console.width))
    for job in plan.jobs:
        if job.reason and job.expected != "duplicate":
            refused = "refused: " if job.expected == "refused" else ""
            console.print(Text(f"job {job.number}: {refused}{job.reason}"), soft_wrap=True)


def _summary(plan: Plan) -> str:
    counts = [
        (plan.count("run"), "to run"),
        (plan.count("done"), "done before"),
        (plan.count("refused"), "refused"),
        (plan.count("duplicate"), "duplicate"),
    ]
    if not plan.jobs:
        return "its sweeper chooses the jobs as it goes"
    return ", ".join(f"{number} {words}" for number, words in counts if number or words == "to run")


def _table(plan: Plan, width: int) -> Table:
    """A row for each combination; where it would be too wide, names are broken and long values cut."""
    axes = list(dict.fromkeys(name for job in plan.jobs for name in job.overrides))
    has_repeats = any(job.repeat for job in plan.jobs)
    titles = [*(axes or ["model"]), *(["repeat"] if has_repeats else [])]
    rows = [
        [
            *([text(job.overrides.get(name)) for name in axes] or [job.job.model]),
            *([str(job.repeat + 1)] if has_repeats else []),
        ]
        for job in plan.jobs
    ]
    expected = [_expected(job) for job in plan.jobs]
    fixed = len("job") + max(len("expected"), *(words.cell_len for words in expected)) + 2 * _GAP
    is_wide = _width(titles, rows) + fixed > width
    if is_wide:
        titles = [broken(title) for title in titles]
        for most in CELL_WIDTHS:
            rows = [[shortened(cell, most) for cell in cells] for cells in rows]
            if _width(titles, rows) + fixed <= width:
                break
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0) if is_wide else (0, 1))
    table.add_column("job", justify="right")
    for title in [*titles, "expected"]:
        table.add_column(title)
    for job, cells, words in zip(plan.jobs, rows, expected, strict=True):
        table.add_row(str(job.number), *cells, words)
    return table


def _width(titles: list[str], rows: list[list[str]]) -> int:
    columns = zip(titles, *rows, strict=True)
    return sum(max(len(word) for cell in cells for word in cell.split("\n")) + _GAP for cells in columns)


def _expected(job: PlannedJob) -> Text:
    words, style = _WORDS.get(job.expected, _DONE)
    if job.expected == "duplicate":
        words = f"duplicate of {job.number}"
    return Text(words, style=style)
