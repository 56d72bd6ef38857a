"""A run: its directory, checkpoints and logs, the processes that share it, and requests to stop."""
