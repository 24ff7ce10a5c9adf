"""Where weights come from: checkpoint files or a seed."""
