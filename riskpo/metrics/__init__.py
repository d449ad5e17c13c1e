"""Numbers of a step and of an evaluation, with their intervals."""
