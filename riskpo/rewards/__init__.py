"""Verifiable rewards: scorer, verdicts, math and code judges, killable workers."""
