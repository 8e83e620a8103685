"""Layers, blocks and the one place where models call attention."""
