"""Compiled programs read without a GPU: HLO, SASS, spills, copies. Nothing in production imports it."""
