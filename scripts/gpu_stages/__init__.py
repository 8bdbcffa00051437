"""What is to be proved on a GPU in a quarter of an hour, in stages that also run on a CPU."""
