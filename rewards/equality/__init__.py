"""Decides whether an answer equals the gold."""
