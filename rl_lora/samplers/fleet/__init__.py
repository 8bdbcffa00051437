"""Engines outside the learner's process: one sampler over many of them."""
