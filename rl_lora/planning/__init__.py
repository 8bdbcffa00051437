"""What a job needs before it runs: parameters, compute, memory and capacity."""
