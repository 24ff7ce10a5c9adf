"""Analyses traces, memory events and memory snapshots, ours and others'. Needs neither torch nor a GPU.

Reading order: `finding` (what an analysis is), then `chrome`, `snapshot` and `run`, one for each kind of file;
`source`, `json_stream` and `plain_pickle` read them, `terminal` and `picture` show them, `command` is the command line.
"""

from wan_sweep.analyze.finding import Analysis
from wan_sweep.analyze.kinds import analyze
from wan_sweep.analyze.snapshot import replay_peaks
from wan_sweep.analyze.source import UnreadableFileError

__all__ = ["Analysis", "UnreadableFileError", "analyze", "replay_peaks"]
