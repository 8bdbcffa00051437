"""Text of an answer to a typed tree."""
