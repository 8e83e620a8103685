"""Weights as files: where they lie, how they are named, how they are read."""
