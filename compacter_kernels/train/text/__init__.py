"""Fine-tuning of a transformers model on texts: classification and text-to-text, by every method."""
