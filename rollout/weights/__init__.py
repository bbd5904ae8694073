"""Weights from the trainer to the engines: what is sent, how it is checked, and the transaction around it."""
