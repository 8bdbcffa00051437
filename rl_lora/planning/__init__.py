"""What a job needs before it runs: memory, capacity."""
