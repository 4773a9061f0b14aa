"""The system: signals, threads, streams, files, locks, digests, errors, and safe text."""
