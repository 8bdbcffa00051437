"""The HTML report of runs: `build` makes the page, `command` writes it, `live` serves it."""
