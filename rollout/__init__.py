"""Sampling: engines, weight sync, rewards, dynamic sampling with recovery, evaluation."""
