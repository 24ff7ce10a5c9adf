"""What wan_sweep itself writes of a job: memory_events.json and attribution.json."""
