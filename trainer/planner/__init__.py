"""Says before a launch whether a configuration fits, and what it will take: `python -m trainer.plan`, docs/planning.md."""
