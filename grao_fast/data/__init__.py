"""Data: prompts with reference answers, from a source to packed micro-batches."""
