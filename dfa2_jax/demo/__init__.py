"""The model in the box with its plan and prompts, as data; the words that it knows; the picture of `dfa2 demo`."""
