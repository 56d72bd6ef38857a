"""Several jobs, planned, trained and compared: `compare` and `sweep`."""
