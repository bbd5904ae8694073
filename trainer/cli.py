"""How a command ends: its exit code, and one line for what the user can mend."""

from rollout.cli import EXIT_ENGINE, EXIT_INPUT, EXIT_INTERRUPTED, EXIT_STOPPED, run

__all__ = ["EXIT_ENGINE", "EXIT_INPUT", "EXIT_INTERRUPTED", "EXIT_STOPPED", "run"]
