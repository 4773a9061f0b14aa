"""Functions of a row of logits, in PyTorch and in Triton."""
