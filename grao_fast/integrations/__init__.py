"""GRAO inside other trainers; each module imports the one that it is for."""
