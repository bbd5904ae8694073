"""Runs of the demo's size under SIGKILL, and long ones whose memory is watched: see `benchmarks.soak.__main__`."""
