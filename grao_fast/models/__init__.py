"""Models: loading, the policy that is trained, its head, its attention, its adapters."""
