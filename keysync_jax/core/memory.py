"""How much memory this process has needed."""

import sys


def peak_bytes() -> int:
    """Largest resident size of this process so far, in bytes; 0 on Windows, where Python does not tell."""
    try:
        import resource  # POSIX only
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak  # macOS counts bytes, Linux kibibytes
