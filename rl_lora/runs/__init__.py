"""A run's folder: record, checkpoints, log, metrics."""
