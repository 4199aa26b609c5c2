"""What every room stands on: errors, files, locks, processes, progress, settings of the machine. Imports no JAX at the top."""
