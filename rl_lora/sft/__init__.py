"""Supervised fine-tuning: the warm start of a run, and jobs by themselves."""
