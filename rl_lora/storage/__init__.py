"""Files that are either complete or absent: JSON, JSON lines, directories."""
