"""The steps, one module each: a function from Rows to an Outcome. None knows of the others."""
