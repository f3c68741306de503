"""One page on loopback that shows what a trained model does, at any depth."""
