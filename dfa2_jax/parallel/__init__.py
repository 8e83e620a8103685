"""Several devices for one batch of images."""
