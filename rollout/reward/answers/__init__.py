"""What an answer says, read from its text, in front of math-verify. Start at `read` and `match`.

Only texts come in, and the standard library is all that is imported: each verification worker loads this.
"""
