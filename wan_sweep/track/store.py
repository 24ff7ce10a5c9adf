"""Where the runs go: the tracking store, opened once and under a lock, with short waits.

MLflow is imported inside functions: the parent process stays light until a sweep really starts.
"""

import logging
import os
import socket
import sqlite3
import ssl
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from filelock import FileLock

from wan_sweep.track.ledger import ARTIFACT_FOLDER

if TYPE_CHECKING:
    from mlflow import MlflowClient

# What MLflow waits for by default adds up to 246 seconds for one call to a server that is not there.
_SHORT_WAITS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "8",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0",
    "MLFLOW_HTTP_REQUEST_BACKOFF_JITTER": "0",
}
_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_LOUD_LOGGERS = ("alembic", "mlflow.store.db.utils", "mlflow.tracking", "mlflow.utils", "urllib3.connectionpool")
_SQLITE = "sqlite:///"
_PROBE_SECONDS = 4.0
_GATEWAY_ERRORS = (502, 503, 504)
_LOCK_SECONDS = 60.0


class TrackingError(Exception):
    """The store cannot be used now; the message says why and what to do."""


@dataclass(frozen=True, kw_only=True)
class Location:
    """A tracking store and what belongs to it.

    Args:
        uri: what MLflow calls the tracking URI.
        artifact_root: folder for the files of new experiments; None where a server decides.
        lock_path: file whose lock is held while the store and its experiment are created.
    """

    uri: str
    artifact_root: Path | None
    lock_path: Path

    @property
    def is_remote(self) -> bool:
        """Whether a server owns the store."""
        return self.uri.startswith(("http://", "https://"))

    @property
    def public_uri(self) -> str:
        """The URI without user and password, fit for files and the screen."""
        parts = urlsplit(self.uri)
        if "@" not in parts.netloc:
            return self.uri
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


@dataclass(frozen=True, kw_only=True)
class Store:
    """An opened store: a client and the experiment that all runs go to."""

    client: "MlflowClient"
    location: Location
    experiment_id: str
    experiment_name: str


def locate(output_root: Path, environment: Mapping[str, str] | None = None) -> Location:
    """Say where runs of `output_root` go: MLFLOW_TRACKING_URI where set, else SQLite in that folder."""
    variables = os.environ if environment is None else environment
    root = output_root.resolve()
    uri = variables.get("MLFLOW_TRACKING_URI", "").strip()
    if not uri:
        uri = f"{_SQLITE}{root / 'mlflow.db'}"
    if not uri.startswith(_SQLITE):
        return Location(uri=uri.rstrip("/"), artifact_root=None, lock_path=root / "mlflow.lock")
    database = Path(uri.removeprefix(_SQLITE)).resolve()
    return Location(
        uri=f"{_SQLITE}{database}",
        artifact_root=database.parent / ARTIFACT_FOLDER,
        lock_path=database.with_name(database.name + ".lock"),
    )


def open_store(location: Location, experiment_name: str) -> Store:
    """Create what is missing of the store and the experiment, under a lock, and return both opened.

    Two processes that meet an empty store would otherwise break each other's tables, and the loser of a race for the
    experiment would write into another one; so the id is settled here and only the id is used afterwards.

    Raises:
        TrackingError: the store does not answer or cannot be written, or the experiment was deleted.
    """
    prepare_environment()
    location.lock_path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(location.lock_path, timeout=_LOCK_SECONDS):
        _probe(location)
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=location.uri)
        experiment_id = _experiment_id(client, location, experiment_name)
    return Store(client=client, location=location, experiment_id=experiment_id, experiment_name=experiment_name)


def prepare_environment() -> None:
    """Give MLflow short waits and no telemetry, wherever the user has not chosen, and no lines of its own."""
    for name, value in (_SHORT_WAITS | _QUIET).items():
        os.environ.setdefault(name, value)
    for name in _LOUD_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def _experiment_id(client: "MlflowClient", location: Location, name: str) -> str:
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        folder = location.artifact_root.as_uri() if location.artifact_root else None
        try:
            return str(client.create_experiment(name, artifact_location=folder))
        except MlflowException:
            # Somebody on another machine was faster; our lock reaches only this one.
            experiment = client.get_experiment_by_name(name)
            if experiment is None:
                raise
    if experiment.lifecycle_stage != "active":
        raise TrackingError(
            f"the experiment {name!r} was deleted from {location.public_uri}; bring it back with "
            f"`mlflow experiments restore --experiment-id {experiment.experiment_id}` or choose another name"
        )
    return str(experiment.experiment_id)


def _probe(location: Location) -> None:
    """Find out within seconds whether the store can be used; MLflow itself would try for minutes.

    Raises:
        TrackingError: it cannot; the message says why.
    """
    try:
        if location.is_remote:
            _ask(location.public_uri + "/health")
        elif location.artifact_root is not None:
            with closing(sqlite3.connect(location.uri.removeprefix(_SQLITE), timeout=_PROBE_SECONDS)) as database:
                database.execute("BEGIN IMMEDIATE")
                database.rollback()
        elif (parts := urlsplit(location.uri)).hostname and parts.port:
            socket.create_connection((parts.hostname, parts.port), timeout=_PROBE_SECONDS).close()
    except (OSError, ValueError, sqlite3.Error) as error:
        reason = getattr(error, "reason", None) or error
        raise TrackingError(f"the MLflow store {location.public_uri} cannot be used ({reason})") from error


def _ask(address: str) -> None:
    """Ask a server for anything; a refusal of this page is an answer too, one by a gateway on its way is not."""
    try:
        with urllib.request.urlopen(address, timeout=_PROBE_SECONDS):  # noqa: S310 - http(s), see is_remote
            return
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in _GATEWAY_ERRORS:
            raise
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # certificates are between MLflow and the user's settings
            raise
