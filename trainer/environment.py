"""What must hold before anything heavy is imported, one writer a run folder, and what a measurement was taken on."""

from rollout.environment import RunLock, check_packages, commit, cpu_model, provenance, version_of

__all__ = ["RunLock", "check_packages", "commit", "cpu_model", "provenance", "version_of"]
