"""Train a LoRA adapter on a frozen base model, in a worker process."""
