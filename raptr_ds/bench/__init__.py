"""The benchmark: our steps beside those of other stacks, on the same weights and batch."""
