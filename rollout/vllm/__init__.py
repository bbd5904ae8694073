"""vLLM as a rollout engine. Importing this package does not import vLLM: `worker.py` and `transfer.py` do, in vLLM's own
process."""
