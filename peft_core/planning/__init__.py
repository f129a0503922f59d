"""From a request to a plan: defaults, estimate of time and memory, and the way to compute. No torch."""
