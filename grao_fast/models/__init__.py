"""Models: loading and saving, adapters, the policy with its head and attention, start-up checks.

`loading`, `adapters` and `adapter_folders` give a model; `attention` and `head` describe how it
computes; `policy` joins them, and `objective` runs a loss inside its forward pass; `parity`
compares it with the model's own logits; `beginning` keeps its first weights; `saving` writes it.
"""
