"""One process of a run of several: joins, counts devices, then meets the others again and again until the deadline (seconds)."""

import sys
import time

from keysync_jax.core.errors import KeySyncError
from keysync_jax.parallel import distributed


def main(coordinator, count, number, seconds, timeout):
    try:
        distributed.start(coordinator, int(count), int(number), timeout=int(timeout))
    except KeySyncError as error:
        print(f"keysync: error: {error}", file=sys.stderr, flush=True)
        return 1
    import jax

    print(f"joined {jax.process_index()} {jax.process_count()} {jax.device_count()}", flush=True)
    end, i = time.monotonic() + float(seconds), 0
    while time.monotonic() < end:
        distributed.sync(f"round {i}")
        i += 1
        time.sleep(0.2)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
