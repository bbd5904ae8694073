"""Section `samples` of a run's configuration: what of a step's outputs is kept for a reader (`trainer.samples`)."""

from __future__ import annotations

from pydantic import Field

from trainer.config_section import Positive, Section


class SamplesConfig(Section):
    groups: int = Field(default=8, ge=0)
    """Groups kept of a step, of each fate in turn (`trainer.samples.choose`); 0: none."""
    every: Positive = 1
    """Of steps whose number is a multiple of it."""
    tokens: bool = True
    """Of each token its place in the text, its log-probability and its entropy too: 7 bytes a token instead of 1 to 2."""
