"""The checkpoint in the box: a small SD3.5-shaped model of drawn scenes, and the scripts that made it."""
