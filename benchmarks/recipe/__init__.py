"""The recipe's claims, reproduced in small: `python -m benchmarks.recipe NAME…` (`__main__.py` says more)."""
