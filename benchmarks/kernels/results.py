"""What a run leaves behind, as plain data: one `CaseResult` a case, one `Measurement` a contender."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from benchmarks.kernels.cases import Case, bytes_to_move, operations_to_do
from benchmarks.kernels.timing import Spread


@dataclass(frozen=True, slots=True)
class Measurement:
    """One contender on one case. reason: why it was not timed; everything measured is then None."""

    contender: str
    kind: str
    version: str
    returns: str
    reason: str | None = None
    milliseconds: Spread | None = None
    errors: dict[str, float] = field(default_factory=dict)
    extra_bytes: int | None = None
    """Peak memory beyond the inputs."""
    returned_bytes: int | None = None
    memory_note: str | None = None
    """Why there is no memory figure."""

    @property
    def beyond_returned_bytes(self) -> int | None:
        if self.extra_bytes is None or self.returned_bytes is None:
            return None
        return max(0, self.extra_bytes - self.returned_bytes)


@dataclass(frozen=True, slots=True)
class CaseResult:
    """floors: what was timed as such. floor_ms: the time the case cannot go under by much (`floor.floor_milliseconds`).
    fp32_errors: of PyTorch's own fp32 computation. skipped: why nothing was measured."""

    case: Case
    measurements: tuple[Measurement, ...] = ()
    floors: dict[str, Spread] = field(default_factory=dict)
    floor_ms: float | None = None
    copy_bandwidth: float | None = None
    """Bytes a second, of the copy in this case's own rounds."""
    fp32_errors: dict[str, float] = field(default_factory=dict)
    skipped: str | None = None

    def of(self, contender: str) -> Measurement | None:
        return next((one for one in self.measurements if one.contender == contender), None)

    def fraction_of_floor(self, one: Measurement) -> float | None:
        """1 at the floor: the share of the copy's bandwidth, or of the GEMMs' speed, that was reached."""
        if self.floor_ms is None or one.milliseconds is None:
            return None
        return self.floor_ms / one.milliseconds.median


def throughput(case: Case, milliseconds: float) -> str:
    """GB/s of the bytes that must move, or TFLOP/s of the GEMMs that must be done."""
    if (moved := bytes_to_move(case)) is not None:
        return f"{moved / milliseconds / 1e6:,.1f} GB/s"
    if (done := operations_to_do(case)) is not None:
        rate = done / milliseconds / 1e6
        return f"{rate / 1000:,.0f} TFLOP/s" if rate > 1e4 else f"{rate:,.0f} GFLOP/s"
    return "–"


def as_json(result: CaseResult) -> dict[str, object]:
    """asdict, with the figures that are computed from it."""
    record = asdict(result)
    record["case"]["name"] = result.case.name
    record["bytes_to_move"], record["operations_to_do"] = bytes_to_move(result.case), operations_to_do(result.case)
    for one, stored in zip(result.measurements, record["measurements"], strict=True):
        stored["beyond_returned_bytes"] = one.beyond_returned_bytes
        stored["fraction_of_floor"] = result.fraction_of_floor(one)
        stored["throughput"] = throughput(result.case, one.milliseconds.median) if one.milliseconds else None
    return record
