"""What plans do to images."""
