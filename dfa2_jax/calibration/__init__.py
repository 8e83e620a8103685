"""Finding plans: the loop over steps, the choice of methods, and other schemes to compare with."""
