"""Solvers of the sampling equation, each on a page of its own."""
