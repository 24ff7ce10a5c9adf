"""Chrome traces: what torch.profiler writes, and any other trace in that format."""
