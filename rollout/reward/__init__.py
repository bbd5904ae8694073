"""Judging a sample: format, repetition, correctness. This file imports nothing: every worker process loads the package."""
