"""Sweeps Wan2.1 video generation over its knobs, one fresh process per job, and records memory and time."""

__version__ = "0.1.0"
