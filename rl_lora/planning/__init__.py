"""What a job needs before it runs: memory and capacity."""
