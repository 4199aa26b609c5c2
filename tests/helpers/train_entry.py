"""`keysync` with accidents: python train_entry.py [HOOK ...] -- VERB ...

kill-at-batch=N   SIGKILL to oneself when the batch of step N (from 0) is asked for, that is while step N - 1 is being computed
slow-commit=S     wait S seconds between writing a checkpoint's files and giving it its name
slow-steps=S      wait S seconds before each batch
interrupt-at-batch=N, raise-at-batch=N   Ctrl-C, or a broken dataset, at that batch
"""

import os
import signal
import sys
import time


def on_batch(action):
    """Call `action(step)` whenever the loop asks for a batch."""
    from keysync_jax.data_pipeline.source.loader import Batches

    original = Batches.__next__

    def hooked(self):
        action(self.step)
        return original(self)

    Batches.__next__ = hooked


def at_batch(number, action):
    on_batch(lambda step: action() if step == int(number) else None)


def slow_commit(seconds):
    from orbax.checkpoint._src.path import atomicity

    original = atomicity.AtomicRenameTemporaryPath.finalize

    async def hooked(self, *args, **kwargs):
        import asyncio

        await asyncio.sleep(float(seconds))
        return await original(self, *args, **kwargs)

    atomicity.AtomicRenameTemporaryPath.finalize = hooked


def broken():
    raise OSError(5, "Input/output error", "shard-00000")


def interrupt():
    raise KeyboardInterrupt


HOOKS = {
    "kill-at-batch": lambda n: at_batch(n, lambda: os.kill(os.getpid(), signal.SIGKILL)),
    "interrupt-at-batch": lambda n: at_batch(n, interrupt),
    "raise-at-batch": lambda n: at_batch(n, broken),
    "slow-steps": lambda s: on_batch(lambda _: time.sleep(float(s))),
    "slow-commit": slow_commit,
}


def main(argv):
    split = argv.index("--")
    for hook in argv[:split]:
        name, _, value = hook.partition("=")
        HOOKS[name](value)
    from keysync_jax.cli import main as cli

    return cli.main(argv[split + 1 :])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
