"""Where problems come from, and how their rows are read."""
