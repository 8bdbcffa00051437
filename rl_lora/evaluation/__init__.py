"""Held-out evaluations: sampling, files, scores, comparisons."""
