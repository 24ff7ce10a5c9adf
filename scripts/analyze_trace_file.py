"""Says where memory and time went, from a trace, a job's memory events or a memory snapshot; ours or anyone's.

Why: a trace viewer shows everything and says nothing. This names the peak, what was live then, what cost the time,
why the GPU waited, and how fast copies were - on a terminal, as JSON, and as a picture. Nothing in a file is executed.

How: python scripts/analyze_trace_file.py PATH [--top N] [--json [FILE]] [--png FILE]
See docs/analyzing_a_trace.md.
"""

from wan_sweep.analyze.command import main

if __name__ == "__main__":
    raise SystemExit(main())
