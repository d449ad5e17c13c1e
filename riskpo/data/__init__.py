"""Rows of files and hubs to questions: prompts, golds, pictures, programs."""
