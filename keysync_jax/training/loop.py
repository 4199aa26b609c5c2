"""The training loop: read it from top to bottom."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax

from keysync_jax.config import to_dict
from keysync_jax.core.compile_cache import use_compile_cache
from keysync_jax.core.errors import KeySyncError
from keysync_jax.core.locking import only_process
from keysync_jax.parallel.distributed import sync
from keysync_jax.parallel.mesh import check_batch, train_mesh
from keysync_jax.parallel.sharding import data_share, global_batch, sharding_table, state_shardings
from keysync_jax.training import data, lpips, profiling, resume
from keysync_jax.training import state as states
from keysync_jax.training.config import TrainConfig
from keysync_jax.training.export import model_card
from keysync_jax.training.optimizer import make_optimizer
from keysync_jax.training.profiling import ProfileWindow
from keysync_jax.training.start import check
from keysync_jax.training.step import make_train_step
from keysync_jax.training.store import checkpoints
from keysync_jax.training.store.checkpoints import Checkpoints
from keysync_jax.training.watch.metrics import Meter, MetricLog, due, line
from keysync_jax.training.watch.watchers import Watch

# Exit status of a run that SIGTERM ended after it had saved its state: not 0, so that a scheduler starts it again.
TERMINATED = 128 + signal.SIGTERM
_SECONDS_TO_LEAVE = 120  # for a run that was stopped and is still saving


def train(
    config: TrainConfig, workdir: str, *, stop_after: int | None = None, profile_steps: tuple[int, int] | None = None, command: str = ""
) -> int:
    """Run until `config.num_steps`, from the last checkpoint of `workdir` if there is one.

    Args:
      config: the run.
      workdir: where everything of the run goes.
      stop_after: end after so many updates of this call.
      profile_steps: (a, b) records the updates a + 1 to b with the profiler.
      command: how the run was started, for its model card.

    Returns:
      The number of updates done.

    Raises:
      KeySyncError: data or weights that do not fit the config, a checkpoint of another model, too many non-finite steps, or a last
        checkpoint that could not be written.
      SystemExit: SIGTERM came; the state is saved (status `TERMINATED`).
    """
    use_compile_cache()
    trainable, notes = check.resolve(config, workdir)
    config = trainable.config
    mesh = train_mesh(config.mesh)
    check_batch(mesh, config.data.batch_size, config.optimizer.accumulate)
    reader = trainable.reader()
    trainable.check_data(reader)

    abstract = trainable.abstract_weights()
    objective = trainable.objective(abstract.vae, lpips.load(config.lpips) if trainable.uses_lpips else None)

    # ------------------------------------------------------------------------------------------------------- model and state
    tx = make_optimizer(config.optimizer)
    ema = config.optimizer.ema_decay > 0
    shapes = jax.eval_shape(lambda p, f: states.create(p, f, tx, ema), abstract.params, abstract.frozen)
    shardings = state_shardings(mesh, shapes)
    abstract_state = jax.tree.map(lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d), shapes, shardings)

    # Only now does the run write: a starting point that is not there or data that do not fit leave no workdir behind, and what another
    # training has in its workdir is left alone.
    with (
        _alone(workdir),
        MetricLog(workdir, tensorboard=config.log.tensorboard, wandb=config.log.wandb, run=dataclasses.asdict(config)) as log,
        Checkpoints(workdir, config.checkpoint, warn=log.say) as saved,
    ):
        log.say(f"{jax.device_count()} × {jax.devices()[0].device_kind}, mesh {' × '.join(f'{k} {v}' for k, v in mesh.shape.items())}")
        for note in notes:
            log.say(note)
        if mesh.size > 1:
            log.say(sharding_table(mesh, shapes))

        # Which weights, by priority: 1. this run's last checkpoint; 2. what config.init says.
        latest = saved.latest()
        if latest is not None:
            log.say(f"continuing from step {latest} of {workdir}")
            for change in resume.changes(saved.meta(latest), trainable, f"checkpoint {latest} of {workdir}"):
                log.say(f"the recipe changed: {change}")
            if latest >= config.num_steps:
                log.say(f"nothing to do: step {latest} is reached, the recipe asks for {config.num_steps}; --config.num_steps=N goes on")
                sync("nothing to do")  # as at the end of training
                return latest
            frozen = checkpoints.restore_frozen(workdir, abstract_state.frozen, saved.checksums(latest).get(checkpoints.FROZEN))
            state, counters = saved.restore(latest, abstract_state)
            state = state.replace(frozen=frozen)
            if counters["data"] != reader.fingerprint:
                log.say("[yellow]the data are not those of the checkpoint: the order of samples starts anew from this step[/yellow]")
        else:
            log.say(f"weights: {config.init.kind} {config.init.path}")
            weights = trainable.initial_weights()
            for note in weights.notes:
                log.say(note)
            params, frozen = jax.device_put((weights.params, weights.frozen), (shardings.params, shardings.frozen))
            state = jax.jit(lambda p, f: states.create(p, f, tx, ema), out_shardings=shardings)(params, frozen)
            checkpoints.save_frozen(workdir, state.frozen)
            del weights, params, frozen
        checkpoints.write_config(workdir, to_dict(config))
        if command and jax.process_index() == 0:  # a command that was refused trained nothing
            model_card.record_command(workdir, command, datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
        count = sum(x.size for x in jax.tree.leaves(state.params))
        held = sum(x.size for x in jax.tree.leaves(state.frozen))
        log.say(f"{count:,} parameters are trained, {held:,} are frozen")

        # ----------------------------------------------------------------------------------------------------------- compile
        first = int(state.step)
        # Samples are counted, not batches, so that a run whose batch size changes leaves none out and repeats none.
        seen = 0
        if latest is not None:  # an older version stored the batch size of all steps
            seen = counters["samples"] if "samples" in counters else first * counters["batch_size"]
        step_fn = jax.jit(make_train_step(objective, tx, config.optimizer, config.seed), donate_argnums=0, out_shardings=(shardings, None))
        with data.make_batches(config, reader, first, *data_share(mesh), seen) as batches, jax.set_mesh(mesh):
            watch = Watch(trainable, mesh, objective, abstract.vae, log, workdir)
            log.say("compiling the step …")
            begin = time.perf_counter()
            batch = global_batch(mesh, data.step_arrays(next(batches)))
            traced = step_fn.trace(state, batch)
            compiled = traced.lower().compile()
            speed = profiling.step_speed(traced.jaxpr, config.dtype, decoder_is_network=trainable.decodes_in_network)
            log.say(f"compiled in {time.perf_counter() - begin:.0f} s; {profiling.describe(speed)}")

            # ----------------------------------------------------------------------------------------------------------- train
            done, stopping, pending = first, False, None
            last = config.num_steps if stop_after is None else min(config.num_steps, first + stop_after)
            meter = Meter(first, last, config.data.batch_size, speed, trainable.unit)
            window = ProfileWindow(workdir, profile_steps, log.say)
            if profile_steps and profile_steps[1] <= first:
                log.say(f"[yellow]no profile: --profile_steps ends at step {profile_steps[1]}, the run goes on from step {first}[/yellow]")
            # Whatever goes between host and devices in the loop is written down as such: what slips in unseen would hold up every step.
            with jax.transfer_guard("disallow"):
                for step in range(first, last):
                    with window.step(step):
                        state, metrics = compiled(state, batch)
                    done = step + 1
                    if done < last:
                        waiting = time.perf_counter()
                        host_batch = next(batches)
                        meter.waited(time.perf_counter() - waiting)
                        batch = global_batch(mesh, data.step_arrays(host_batch))
                    # Metrics are read one step late, so that the device always has the next step to do.
                    pending = _report(config, log, meter, pending, (done, metrics), saved.latest)
                    window.after(done, state)
                    stopping = saved.reached_preemption(done)
                    with jax.transfer_guard("allow"):  # Orbax has its own ways
                        if done % config.checkpoint.every == 0 or done in (last, config.checkpoint.weak_at) or stopping:
                            samples = seen + (done - first) * config.data.batch_size
                            counters = {"step": done, "skipped": int(state.skipped), "data": reader.fingerprint, "samples": samples}
                            # What is kept of updates that were left out would push the last good checkpoints off the end of the list.
                            if not counters["skipped"] or done == last or stopping:
                                saved.save(state, counters, resume.describe(trainable))
                        saved.check()
                    if stopping:
                        break
                    watch(done, state, meter)
            window.close()
            _report(config, log, meter, pending, None, saved.latest)
            watch.curve()
        saved.wait()
        sync("end of training")  # a process that ends early would be taken for dead
        if stopping and done < last:
            log.say(f"SIGTERM: stopped after step {done} of {last}, which is saved; the same command continues from there")
            raise SystemExit(TERMINATED)
        log.say(f"done: {last} steps")
    return last


def _alone(workdir: str) -> AbstractContextManager[None]:
    """Two trainings in one workdir would delete each other's checkpoints; one that was just stopped may still be writing its last."""
    if jax.process_index():
        return nullcontext()
    refusal = f"another training is at work in {workdir}; stop it or give another --workdir"
    return only_process(workdir, refusal, wait_s=_SECONDS_TO_LEAVE, say=functools.partial(print, file=sys.stderr, flush=True))


def _report(config: TrainConfig, log: MetricLog, meter: Meter, pending: Any, current: Any, last_good: Callable[[], int | None]) -> Any:
    """Look at the metrics of the step before; returns the current ones, None after the last step."""
    if pending is None:
        return current
    step, metrics = pending
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    meter.add(values)
    if not values["finite"]:
        log.say(f"[red]step {step}: loss or gradient is not finite; the update was left out ({values['skipped']:.0f} in a row)[/red]")
        if values["skipped"] >= config.optimizer.max_skipped:
            kept = last_good()
            goes_on = (
                "there is no checkpoint yet" if kept is None else f"the same command goes on from the last good checkpoint, step {kept}"
            )
            raise KeySyncError(
                f"step {step}: {values['skipped']:.0f} updates in a row were not finite; look at the data and lower "
                f"optimizer.learning_rate; {goes_on}"
            )
    if due(step, config.log.every) or current is None:
        values = meter.take(step)
        log.say(line(step, values, meter))
        log.write(step, values)
    return current
