"""`python -m keysync_jax VERB` is `keysync VERB`."""

import sys

from keysync_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
