"""The machinery of any trainer: configuration, data on devices, runs, checkpoints, evaluation."""
