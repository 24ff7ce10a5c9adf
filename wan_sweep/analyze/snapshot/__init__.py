"""Memory snapshots of torch: the state of the caching allocator, and the history that led to it."""

from wan_sweep.analyze.snapshot.replay import replay_peaks

__all__ = ["replay_peaks"]
