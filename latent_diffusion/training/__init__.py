"""The training loop, and everything that a run needs before its first step."""
