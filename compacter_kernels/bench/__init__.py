"""The micro-benchmark: every impl, and a user's alternatives, timed in turns in one process."""
