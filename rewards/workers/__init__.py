"""Subprocesses for comparisons that need bounded time and memory."""
