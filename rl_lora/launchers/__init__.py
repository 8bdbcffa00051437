"""Who starts and ends this process: its environment, and its signals."""
