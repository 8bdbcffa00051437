"""Checks for 15 minutes of a GPU, in stages that also run on a CPU."""
