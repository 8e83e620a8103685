"""Plans as data, as files and as pictures."""
