"""Implementations of the two ops; `devices` says which serves what."""
