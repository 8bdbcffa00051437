"""Sampling with vLLM in the process of the learner."""
