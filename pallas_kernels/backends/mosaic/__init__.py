"""Kernels in Pallas's Mosaic GPU dialect, for Hopper."""
