"""Reports: tables and progress on the terminal, figures, and the HTML page of runs."""
