"""The final answer of a completion."""
