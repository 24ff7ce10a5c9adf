"""Addresses of MLflow's own pages for one sweep, and the command that shows them."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from wan_sweep.track.store import Location

DEFAULT_PORT = 5000
_COMPARED_AT_MOST = 60  # each run id adds 41 characters to the address


def charts_url(base: str, experiment_id: str, sweep_id: str) -> str:
    """Return the address of the chart page with the jobs of one sweep and nothing else."""
    where = f"tags.sweep = '{sweep_id}' and tags.role = 'job'"
    return f"{base}/#/experiments/{experiment_id}/runs?searchFilter={quote(where, safe='')}&compareRunsMode=CHART"


def compare_url(base: str, experiment_id: str, run_ids: Sequence[str]) -> str:
    """Return the address of the page that puts the given runs side by side."""
    runs = json.dumps(list(run_ids[:_COMPARED_AT_MOST]), separators=(",", ":"))
    experiments = json.dumps([experiment_id], separators=(",", ":"))
    return f"{base}/#/compare-runs?runs={quote(runs, safe='')}&experiments={quote(experiments, safe='')}"


def base_url(location: Location, port: int = DEFAULT_PORT) -> str:
    """Return where the UI answers: the server itself, or the one that `ui_command` starts here."""
    return location.public_uri if location.is_remote else f"http://127.0.0.1:{port}"


def ui_command(output_root: Path) -> str:
    """Return the line that starts the UI over the store of `output_root`, ready to be pasted."""
    return shlex.join([_python(), "-m", "wan_sweep.track.ui", "--output-root", str(_short(output_root))])


def sync_command(folder: Path) -> str:
    """Return the line that sends everything in `folder` that could not be sent, ready to be pasted."""
    return shlex.join([_python(), "-m", "wan_sweep.track.sync", str(_short(folder))])


def _python() -> str:
    return str(_short(Path(sys.executable)))


def _short(path: Path) -> Path:
    """Return the path from the current folder where it lies inside it; symbolic links stay as they are."""
    absolute, here = path.absolute(), Path.cwd()
    return absolute.relative_to(here) if absolute.is_relative_to(here) else absolute
