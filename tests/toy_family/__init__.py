"""A family of its own: what docs/adding-a-family.md shows, and tests/families/test_family.py runs."""
