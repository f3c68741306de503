"""Fine-tuning of encoders on Hugging Face's Trainer: tasks, heads, metrics, seeds."""
