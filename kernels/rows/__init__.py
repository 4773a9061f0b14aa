"""What is done to a row of logits, in PyTorch and in Triton."""
