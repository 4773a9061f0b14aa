"""GRAO inside other trainers; each module needs the library of its trainer."""
