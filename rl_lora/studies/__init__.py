"""Studies: grids of runs, from the plan to the figures."""
