"""The command line: a file per family of verbs. Each parses, calls one function and prints one report."""
