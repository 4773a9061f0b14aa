"""What a run needs of the machine: signals, threads, streams, files, locks, a terminal."""
