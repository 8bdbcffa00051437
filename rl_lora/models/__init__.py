"""Base models: found, checked, described without their weights; the tiny one is made here."""
