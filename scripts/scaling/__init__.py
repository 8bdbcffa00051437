"""What `scripts/scaling/simulate.py` runs."""
