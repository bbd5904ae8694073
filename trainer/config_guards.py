"""The sections `guards`, `alarms` and `mismatch` of a configuration (`trainer.config`): what is never trained on, and what a
person is told."""

from __future__ import annotations

from pydantic import Field, model_validator

from trainer.config_section import Positive, Section

BandConfig = tuple[float, float]
ALARMS = (
    "entropy",
    "language",
    "repetition",
    "truncation",
    "length",
    "recovery_empty",
    "recovery_unused",
    "over_generation",
    "mismatch",
)


class GuardsConfig(Section):
    """Against numbers that are not finite (`trainer.guards`)."""

    max_skipped: Positive = 3
    """After so many steps in a row with a skipped mini-batch the run stops with a checkpoint and exit code 3. One bad batch may
    be chance; three in a row have a cause that more steps do not mend."""
    keep: Positive = 20
    """Skipped mini-batches kept for study in RUN/quarantine, the newest."""


class MismatchConfig(Section):
    """Bounds on |log-probability sampled - recomputed|, nats (`trainer.mismatch.bounds_of`). The paper is silent; they are
    ours."""

    token_bound: float | None = Field(default=None, gt=0)
    """Tokens above it are counted as beyond; None: 1e-3 where engine and policy compute in fp32, else 0.2."""
    mean_bound: float | None = Field(default=None, gt=0)
    """A step whose mean exceeds it raises the alarm; None: 1e-4 where engine and policy compute in fp32, else 0.05."""


class AlarmsConfig(Section):
    """The recipe's signs of failure (`trainer.alarms` says the rules). A step's value is in its metrics row. None: that alarm is
    off. The paper names the signs and gives no numbers: these are ours."""

    steps: Positive = 5
    """Means are taken over so many steps, and an alarm ends after so many in a row without its cause. At 256 outputs a step a
    share of 0.1 then has a standard error below 0.01."""
    entropy_band: BandConfig | None = (0.5, 1.5)
    """A stage with TER: bounds of the mean entropy, as multiples of the target. The paper's own sensitivity range for the target
    (0.4 to 0.7 around 0.55) lies well inside."""
    entropy_drift: BandConfig | None = (0.2, 3.0)
    """A stage without: as multiples of the mean over the stage's first `steps` steps. Entropy falls in healthy runs too, as
    answers become certain: to a third in ours on SmolLM2-135M."""
    entropy_steps: Positive = 10
    """Steps in a row outside, before the alarm: TER with a small coefficient needs some to bring a new policy to its target."""
    language: float | None = Field(default=0.1, gt=0, le=1)
    """Rise of the share of outputs that mix languages (language/mixed) above its least in the run."""
    repetition: float | None = Field(default=0.1, gt=0, le=1)
    """Rise of the share of outputs refused for repetition (verdict/repetition) above its least in the stage."""
    truncation: float | None = Field(default=0.25, gt=0, le=1)
    """Rise of the share of outputs cut off at the limit (verdict/truncated) above its least in the stage. Lengths that grow are
    the recipe's aim; a quarter of all outputs lost at the limit is time for the next stage, or endless thinking."""
    length: float | None = Field(default=0.5, gt=0, lt=1)
    """The mean length fell below this part of its greatest in the stage."""
    recovery_empty: Positive | None = 10
    """A stage with recovery: after so many steps in a row no surplus had been left to recover."""
    recovery_unused: Positive | None = 5
    """A stage with recovery: in so many steps in a row groups waited and none of them was trained on. One waits a single step, so
    one such step is unusual and five are a fault."""
    over_generation: float | None = Field(default=12.0, gt=1)
    """A dynamic stage: groups sampled for each one trained on. The paper tells of 3 to 9 without recovery."""
    mismatch: Positive | None = 1
    """Steps in a row in which the mean of |log-probability sampled - recomputed| is above mismatch.mean_bound."""
    stop: tuple[str, ...] = ()
    """Alarms that end the run with a checkpoint and exit code 3, such as [entropy, mismatch]. The others are told and do
    nothing."""

    @model_validator(mode="after")
    def _possible(self) -> AlarmsConfig:
        for name in ("entropy_band", "entropy_drift"):
            band = getattr(self, name)
            if band is not None and not 0 <= band[0] < 1 < band[1]:
                raise ValueError(f"{name}: {list(band)} must be multiples around 1, such as [0.5, 1.5]")
        for name in self.stop:
            if name not in ALARMS:
                raise ValueError(f"stop: {name!r} is no alarm; the alarms are {', '.join(ALARMS)}")
            sources = ("entropy_band", "entropy_drift") if name == "entropy" else (name,)
            if all(getattr(self, source) is None for source in sources):
                raise ValueError(f"stop: {name!r} is off ({' and '.join(sources)}: null), so it cannot stop the run")
        return self
