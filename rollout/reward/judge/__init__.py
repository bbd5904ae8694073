"""Correctness by a language model behind an OpenAI-compatible endpoint, for prompts that no rule can decide."""
