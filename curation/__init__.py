"""Raw questions in, clean prompts.parquet out: the data of the Confucius3-Math recipe (arXiv 2506.18330), step by step.

Stands beside the trainer and imports none of it. `python -m curation --help`; docs/curation.md.
"""
