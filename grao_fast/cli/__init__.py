"""The command line, `grao-fast`: its commands, options, config files and messages."""
