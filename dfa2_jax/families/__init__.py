"""What differs between models: a folder each, one line in `registry`."""
