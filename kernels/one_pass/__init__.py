"""The pass over chunks of rows, which computes loss and gradients, and its operators."""
