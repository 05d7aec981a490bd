"""From benchmark JSON to a tidy frame, tables, plots, a page and a gate; needs no torch, no GPU."""
