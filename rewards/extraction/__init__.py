"""Finds the final answer of a completion."""
