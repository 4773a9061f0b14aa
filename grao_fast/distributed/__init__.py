"""The processes that train together: starting, agreeing, and ending together.

`launch` joins what torchrun, srun or accelerate has started; `World` is how everything else asks
the other processes for anything; `watch` notices the death of one; `choice` decides how a model is
divided. One process is a world of one, in which nothing is exchanged.
"""
