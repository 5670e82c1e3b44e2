"""The micro-benchmark: every impl, and what a user could run instead, interleaved in one process."""
