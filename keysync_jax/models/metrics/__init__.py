"""Networks that metrics look through, in Flax under their published names: parameters only, batch norm as four leaves."""
