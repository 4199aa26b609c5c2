"""What happens beside the training, at its steps: validation, sample pictures, the curves."""

from __future__ import annotations

import jax
from etils import epath
from jax.sharding import Mesh

from keysync_jax.config import VAEConfig
from keysync_jax.training.objective import Objective
from keysync_jax.training.state import TrainState
from keysync_jax.training.store.workdir import beside_training
from keysync_jax.training.trainable import Trainable
from keysync_jax.training.watch import pictures, validation
from keysync_jax.training.watch.metrics import Meter, MetricLog, due
from keysync_jax.training.watch.samples import Samples
from keysync_jax.training.watch.validation import Validation


class Watch:
    """Opens the validation data before the first step, so that what is wrong with them is said before hours have passed.

    Nothing here draws from the run's random numbers or changes its state: a run is the same with and without it, bit for bit.
    """

    def __init__(
        self, trainable: Trainable, mesh: Mesh, objective: Objective, vae: VAEConfig | None, log: MetricLog, workdir: epath.PathLike
    ):
        """Args:
          trainable, mesh, objective, log, workdir: of the run.
          vae: `VAEConfig` of the decoder among the frozen leaves, None if there is none.

        Raises:
          KeySyncError: `config.data.validation` or `config.init.vae` names something that cannot be used.
        """
        config = trainable.config
        self._config, self._log, self._workdir = config.log, log, workdir
        self._validation: Validation | None = None
        self._samples: Samples | None = None
        reader = validation.open_reader(trainable, log.say)
        if reader is None:
            return
        if config.log.validate_every and config.log.validation_batches:
            self._validation = Validation(trainable, reader, objective, mesh, log.say)
        if config.log.samples_every and config.log.samples:
            self._samples = Samples(trainable, reader, mesh, log, workdir, vae)

    def __call__(self, step: int, state: TrainState, meter: Meter) -> None:
        """Whatever is due after `step` updates. To be called by every process, inside `jax.set_mesh`."""
        validate = self._validation is not None and due(step, self._config.validate_every)
        sample = self._samples is not None and due(step, self._config.samples_every)
        if not validate and not sample:
            return
        jax.block_until_ready(state.step)  # what the devices still have to do is training
        with meter.paused():
            values = self._validation(step, state) if self._validation and validate else {}
            values |= self._samples(step, state) if self._samples and sample else {}
            self._log.write(step, values)
            if validate:
                self.curve()

    def curve(self) -> None:
        """Draw WORKDIR/curve.png, unless everything here is off."""
        if jax.process_index() == 0 and (self._config.validate_every or self._config.samples_every):
            with beside_training(epath.Path(self._workdir) / pictures.CURVE, self._log.say):
                pictures.draw_curve(self._workdir)
