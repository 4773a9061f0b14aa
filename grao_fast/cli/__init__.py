"""The command line, `grao-fast`."""
