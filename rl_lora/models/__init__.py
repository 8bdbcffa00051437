"""Base models: resolving names, checking directories, shapes without weights, tiny models."""
