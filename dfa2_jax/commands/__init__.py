"""What each command of `dfa2` does: a module each, imported when it runs."""
