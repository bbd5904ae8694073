"""Section `checkpoint` of a run's configuration."""

from __future__ import annotations

from pydantic import Field

from trainer.config_section import Positive, Section


class CheckpointConfig(Section):
    every: Positive = 10
    """Steps between checkpoints; one is always written after the last step."""
    keep: Positive = 2
    """The newest so many stay."""
    keep_every: Positive | None = None
    """Those of steps that are multiples of it stay for good; None: none does."""
    keep_best: bool = False
    """The one with the highest mean pass@1 over evaluation.sets stays too, of those saved after a step that was evaluated."""
    asynchronous: bool = True
    """Written from a copy in host memory while the run goes on (`trainer.checkpoint_tensors.Staging` says how large); false: no
    copy, and the run waits."""
    seconds: float = Field(default=1800.0, gt=0)
    """Deadline of each part of a write (all shards are one); past it the run stops and says where."""
    max_failures: Positive = 3
    """After so many saves in a row that the disk did not take, the run ends."""
    stop_seconds: float = Field(default=600.0, gt=0)
    """Deadline of a run that was asked to stop: for the step under way, from its scoring on, and its checkpoint."""
