"""The fine-tuning demonstration: a small vision transformer on real handwritten digits, adapted in six ways."""
