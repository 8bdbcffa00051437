"""Files that are whole or not there: JSON lines, directories."""
