"""A trained network: evaluated, recalibrated, served, or gone on from."""
