"""Training: the steps of a run, their memory and metrics, and checkpoints.

`rollout` samples and scores, `coefficients` weighs, `step` updates, `optim` optimises, `memory`
finds the token budget, and `metrics`, `flops` and `diagnosis` report. `progress` saves and resumes
a run by `saver`, `checkpoint`, `state` and `identity`. `inputs` reads what a run is given,
`results` writes what it returns.
"""
