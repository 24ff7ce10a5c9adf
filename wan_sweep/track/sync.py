"""`python -m wan_sweep.track.sync DIR`: send to MLflow what could not be sent, of all sweeps, one sweep or one job."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from wan_sweep.track.ledger import pending_folders, read_entry
from wan_sweep.track.send import send_job, send_sweep
from wan_sweep.track.store import Store, locate, open_store
from wan_sweep.track.tracker import link_text

_DEFAULT_EXPERIMENT = "wan-sweep"


def main(arguments: Sequence[str] | None = None) -> int:
    """Send everything pending below one folder; returns 0 when nothing is left, else 1."""
    parser = argparse.ArgumentParser(prog="python -m wan_sweep.track.sync", description="Send pending jobs to MLflow.")
    parser.add_argument("folder", type=Path, help="outputs folder, one sweep or one job")
    parser.add_argument("--experiment", default=_DEFAULT_EXPERIMENT, help="for jobs that no sweep tried to send")
    options = parser.parse_args(arguments)
    root = options.folder.resolve()
    if not root.is_dir():
        sys.stderr.write(f"folder={options.folder} does not exist; give an outputs folder, a sweep or a job\n")
        return 2
    stores: dict[tuple[str, str], Store | None] = {}
    pending = pending_folders(root, unmarked=True)
    sent = [folder for folder in pending if _send(folder, options.experiment, stores)]
    sys.stdout.write(f"{len(sent)} of {len(pending)} pending folders sent to MLflow\n")
    for folder in sent:
        if not _is_job(folder):
            _show_links(folder, stores)
    return 0 if len(sent) == len(pending) else 1


def _send(folder: Path, experiment: str, stores: dict[tuple[str, str], Store | None]) -> bool:
    store = _store_for(folder, experiment, stores)
    if store is None:
        return False
    try:
        (send_job if _is_job(folder) else send_sweep)(store, folder)
    except Exception as error:  # noqa: BLE001 - one folder's trouble is told, the next may go through
        sys.stderr.write(f"not sent: {folder}: {error}\n")
        return False
    return True


def _store_for(folder: Path, experiment: str, stores: dict[tuple[str, str], Store | None]) -> Store | None:
    """Return the store that a folder was meant for, opened once; None, and a word about it, where it cannot be."""
    entry = read_entry(folder)
    name = entry.experiment if entry else experiment
    root = _output_root(folder)
    chosen = os.environ.get("MLFLOW_TRACKING_URI", "").strip() or (entry.store if entry else "")
    location = locate(root, {"MLFLOW_TRACKING_URI": chosen})
    key = (location.uri, name)
    if key not in stores:
        try:
            stores[key] = open_store(location, name)
        except Exception as error:  # noqa: BLE001 - told here, and the exit code tells too
            sys.stderr.write(f"{error}\n")
            stores[key] = None
    return stores[key]


def _show_links(sweep: Path, stores: dict[tuple[str, str], Store | None]) -> None:
    entry = read_entry(sweep)
    for store in stores.values():
        if store and entry and (store.location.public_uri, store.experiment_name) == (entry.store, entry.experiment):
            sys.stdout.write(link_text(store, _output_root(sweep), sweep) + "\n")


def _output_root(folder: Path) -> Path:
    """Return the nearest folder above that has a store, or the place where a sweep's store would be."""
    above = next((parent for parent in folder.parents if (parent / "mlflow.db").is_file()), None)
    return above or folder.parents[2 if _is_job(folder) else 1]


def _is_job(folder: Path) -> bool:
    return (folder / "record.json").is_file()


if __name__ == "__main__":
    raise SystemExit(main())
