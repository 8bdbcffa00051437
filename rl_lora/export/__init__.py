"""Exports: merged models, and adapters on the hub."""
