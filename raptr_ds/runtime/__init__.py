"""What surrounds training: metrics and their sinks, throughput, signals, state and checkpoints."""
