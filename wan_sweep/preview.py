"""A plan as text: what will run, and why the rest will not."""

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from wan_sweep.plan import Plan, PlannedJob
from wan_sweep.schema import text

_WORDS = {"run": ("run", "green"), "duplicate": ("duplicate", "dim"), "refused": ("refused", "yellow")}
_DONE = ("done before", "cyan")


def print_plan(plan: Plan, console: Console) -> None:
    """Prints head, notes, a row for each combination, and each reason on a line of its own."""
    console.print(Text(f"sweep {plan.name} {plan.id}: {_summary(plan)}"), soft_wrap=True)
    for line in filter(None, [plan.description, *plan.notes]):
        console.print(Text(line), soft_wrap=True)
    if plan.jobs:
        console.print(_table(plan))
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


def _table(plan: Plan) -> Table:
    axes = list(dict.fromkeys(name for job in plan.jobs for name in job.overrides))
    has_repeats = any(job.repeat for job in plan.jobs)
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("job", justify="right")
    for title in [*(axes or ["model"]), *(["repeat"] if has_repeats else []), "expected"]:
        table.add_column(title)
    for job in plan.jobs:
        values = [text(job.overrides.get(name)) for name in axes] or [job.job.model]
        repeat = [str(job.repeat + 1)] if has_repeats else []
        table.add_row(str(job.number), *values, *repeat, _expected(job))
    return table


def _expected(job: PlannedJob) -> Text:
    words, style = _WORDS.get(job.expected, _DONE)
    if job.expected == "duplicate":
        words = f"duplicate of {job.number}"
    return Text(words, style=style)
