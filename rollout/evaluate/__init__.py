"""How good is a model: benchmarks sampled k times by any engine, judged by the reward's rule, with intervals and everything kept.

    benchmarks → prompts → engine (rollout.lane) → grades → outputs.jsonl → results.json, results.md

`python -m rollout.evaluate --help`; docs/evaluation.md. Readers and field maps are the curation's, which imports nothing of
the project: one place knows where a public set keeps its questions.
"""
