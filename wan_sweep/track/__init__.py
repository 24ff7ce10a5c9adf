"""MLflow, and nothing else knows it: one run per job, one per sweep, sent by the parent from files."""

from wan_sweep.track.tracker import Tracker

__all__ = ["Tracker"]
