"""`python -m wan_sweep.track.ui`: MLflow's UI over one outputs folder, on this machine only.

One worker, no job queues and no telemetry: 0.4 GB and 6 seconds instead of 2.3 GB and 14.
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from wan_sweep.track.links import DEFAULT_PORT, base_url
from wan_sweep.track.store import Location, locate, prepare_environment

_HOST = "127.0.0.1"


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the UI and stay until it ends; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m wan_sweep.track.ui", description="Open MLflow's UI on this machine."
    )
    parser.add_argument("--output-root", type=Path, default=Path("outputs"), help="folder with mlflow.db")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="port on 127.0.0.1")
    options = parser.parse_args(arguments)
    location = locate(options.output_root)
    problem = _problem(location, options.port)
    if problem:
        sys.stderr.write(problem + "\n")
        return 2
    sys.stdout.write(f"MLflow UI: {base_url(location, options.port)} (Ctrl-C ends it)\n")
    sys.stdout.flush()
    if not location.is_remote:
        prepare_environment()
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        command = server_command(location, options.port)
        os.execve(command[0], command, environment)  # noqa: S606 - becomes the server, so that signals reach it
    return 0


def server_command(location: Location, port: int) -> list[str]:
    """Return the arguments of the server process."""
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", location.uri]
    if location.artifact_root is not None:
        command += ["--default-artifact-root", location.artifact_root.as_uri()]
    return [*command, "--host", _HOST, "--port", str(port), "--workers", "1"]


def _problem(location: Location, port: int) -> str:
    """Return why the UI cannot start, with the way out; empty when it can."""
    if location.is_remote:
        return ""
    if location.uri.startswith("sqlite:///"):
        database = Path(location.uri.removeprefix("sqlite:///"))
        if not database.is_file():
            return f"no store at {database}: run a sweep first, or give its folder with --output-root"
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((_HOST, port))
        except OSError:
            return f"port={port} is taken on {_HOST}: another UI may be open already; choose another with --port"
    return ""


if __name__ == "__main__":
    raise SystemExit(main())
