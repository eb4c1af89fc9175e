"""The command line, and starting worlds of processes."""
