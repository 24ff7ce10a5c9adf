"""The parent's way into MLflow: files were first, this comes second and may fail without loss."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from wan_sweep.errors import RecordError
from wan_sweep.track.ledger import Entry, pending_folders, read_entry, write_entry
from wan_sweep.track.links import base_url, charts_url, compare_url, sync_command, ui_command
from wan_sweep.track.send import records_of, send_job, send_sweep
from wan_sweep.track.store import Store, locate, open_store

_LOG = logging.getLogger(__name__)
_CATCH_UP_SECONDS = 20.0
_HAS_NUMBERS = frozenset({"ok", "skipped"})


class Tracker:
    """Sends jobs and sweeps to MLflow; every trouble is a warning with the way out, never an exception.

    After the first trouble it stays off, so that a sweep pays for an absent server once. What was not sent is marked
    pending in `tracking.json` and goes out with the sync command or at the end of the next sweep.

    Args:
        output_root: folder of all sweeps, where the SQLite store lies unless MLFLOW_TRACKING_URI names another.
        experiment_name: experiment that all runs go to; created when missing.
    """

    def __init__(self, output_root: Path, experiment_name: str) -> None:
        self._output_root = output_root.resolve()
        self._experiment_name = experiment_name
        self._store: Store | None = None
        self._trouble: str | None = None

    @property
    def is_on(self) -> bool:
        """Whether jobs are being sent."""
        return self._store is not None

    def open(self) -> None:
        """Import MLflow and make sure of store and experiment; called once, before the first job."""
        try:
            self._store = open_store(locate(self._output_root), self._experiment_name)
        except Exception as error:  # noqa: BLE001 - tracking must never stop a measurement
            self._turn_off(error)

    def log_job(self, record_path: Path) -> None:
        """Send the job whose record lies at `record_path`; once only, however often it is called."""
        folder = record_path.parent
        if self._attempt(send_job, folder) is None:
            self._mark_pending(folder)

    def close_sweep(self, sweep_dir: Path) -> str | None:
        """Send the sweep's report and what earlier sweeps left over; returns the lines that lead into the UI."""
        run_id = self._attempt(send_sweep, sweep_dir)
        if self._store is None or run_id is None:
            self._mark_pending(sweep_dir)
            return None
        self._catch_up()
        try:
            return link_text(self._store, self._output_root, sweep_dir)
        except Exception as error:  # noqa: BLE001 - see open
            self._turn_off(error)
            return None

    def _attempt(self, send: Callable[[Store, Path], str], folder: Path) -> str | None:
        if self._store is None:
            return None
        try:
            return send(self._store, folder)
        except RecordError as error:
            _LOG.warning("not sent to MLflow: %s", error)
            return None
        except Exception as error:  # noqa: BLE001 - see open
            self._turn_off(error)
            return None

    def _catch_up(self) -> None:
        """Send leftovers of earlier sweeps to the same store and experiment, for a limited time."""
        deadline = time.monotonic() + _CATCH_UP_SECONDS
        for folder in pending_folders(self._output_root, unmarked=False):
            if self._store is None or time.monotonic() > deadline:
                return
            entry = read_entry(folder)
            here = (self._store.location.public_uri, self._store.experiment_name)
            if entry is not None and (entry.store, entry.experiment) == here:
                is_job = (folder / "record.json").is_file()
                self._attempt(send_job if is_job else send_sweep, folder)

    def _mark_pending(self, folder: Path) -> None:
        try:
            entry = read_entry(folder)
            if entry is None:
                store = locate(self._output_root).public_uri
                entry = Entry(state="pending", store=store, experiment=self._experiment_name, reason=self._trouble)
                write_entry(folder, entry)
        except OSError as error:
            _LOG.warning("cannot mark %s as not sent to MLflow: %s", folder, error)

    def _turn_off(self, error: Exception) -> None:
        self._store = None
        self._trouble = str(error).strip().partition("\n")[0] or type(error).__name__
        _LOG.warning(
            "MLflow gets nothing more from this sweep: %s. All results are in files; send them later with: %s",
            self._trouble,
            sync_command(self._output_root),
        )


def link_text(store: Store, output_root: Path, sweep_dir: Path) -> str:
    """Return how to open the UI, and the addresses of the charts and of the comparison of one sweep."""
    jobs = [(record, read_entry(folder)) for folder, record in records_of(sweep_dir)]
    sent = [(record, entry.run_id) for record, entry in jobs if entry and entry.is_sent and entry.run_id]
    measured = [run_id for record, run_id in sent if record.outcome in _HAS_NUMBERS]
    base = base_url(store.location)
    lines = [f"MLflow: {len(sent)} runs in experiment {store.experiment_name!r}"]
    if not store.location.is_remote:
        lines.append(f"  start    {ui_command(output_root)}")
    lines.append(f"  charts   {charts_url(base, store.experiment_id, jobs[0][0].sweep_id)}")
    if len(measured) > 1:
        lines.append(f"  compare  {compare_url(base, store.experiment_id, measured)}")
    return "\n".join(lines)
