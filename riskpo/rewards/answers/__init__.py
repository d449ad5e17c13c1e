"""Final answers in text: where they are, how they may be written, when two are equal."""
