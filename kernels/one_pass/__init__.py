"""The pass over chunks of rows: head, loss terms and gradients; and its operators."""
