"""The training loop and what it stands on: configuration, objectives, FSDP, packing, checkpoints, metrics, figures."""
