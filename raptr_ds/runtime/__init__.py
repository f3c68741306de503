"""What surrounds training: metrics and their sinks, signals, state and checkpoints."""
