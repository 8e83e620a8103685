"""From a prompt to an image."""
