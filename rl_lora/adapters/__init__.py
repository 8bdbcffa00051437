"""Adapters on disk: writing, reading, merging, resizing, model cards."""
