"""The samplers, and the check that they sample from the adapter that was published."""
