"""Training of the two stages: settings, losses, sampling, checkpoints, a command per stage."""
