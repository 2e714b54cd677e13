"""The command line: turns arguments into calls, and errors into one line and an exit code."""
