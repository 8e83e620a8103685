"""The denoising loop, and the numbers that it needs."""
