"""Files and errors."""
