"""The processes that train together: starting, agreeing, and ending together.

`launch` joins what torchrun, srun or accelerate has started. `World` is how everything else asks
the other processes for anything. `links` notices the death of one, and `watch` ends all if one
fails. `choice` decides how a model is divided, and `folders` writes by all. One process is a world
of one, in which nothing is exchanged.
"""
