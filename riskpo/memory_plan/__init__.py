"""What takes memory, before a run and beside its measured peak."""
