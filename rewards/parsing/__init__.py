"""Parses the text of an answer into a typed tree."""
