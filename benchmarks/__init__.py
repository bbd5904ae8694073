"""Measurements: what a command here prints or writes under results/ is what README and docs may claim."""
