"""Using adapters: the client side of the inference worker. The worker itself is `inference/worker/`."""
