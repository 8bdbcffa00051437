"""Evaluations: sampled, stored, scored, compared."""
