"""Grids of runs: planned, run, tabulated, drawn."""
