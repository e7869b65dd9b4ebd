"""Every option, and how a file and the command line become one frozen config."""
