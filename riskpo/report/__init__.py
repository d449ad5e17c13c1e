"""What a run tells: logs, progress, plots, explanations."""
