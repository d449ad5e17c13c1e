"""From rollouts to new weights: update, optimiser, sharding, checkpoints."""
