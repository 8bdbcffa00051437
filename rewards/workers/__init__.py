"""Subprocesses that decide, in bounded time and memory, what the parent cannot cheaply."""
