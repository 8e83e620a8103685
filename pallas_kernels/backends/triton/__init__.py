"""Kernels in Pallas's Triton dialect, for every NVIDIA GPU from compute capability 8.0 on."""
