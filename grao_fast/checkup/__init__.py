"""`check`: what can be known about a run before it is started.

`run` is the door. Facts are measured by `folder` (output_dir and the checkpoint in it), `rows`
(lengths and template of the datasets), `groups` (samples and rewards of a few prompts), `held_out`
(answers to a few held-out prompts) and `step` (memory and time of an update). `on_rows`,
`on_groups`, `on_rewards` and `on_step` turn facts into findings, by the limits in `findings`.
`result` shows them.
"""
