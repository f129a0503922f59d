"""From a request to a job: defaults, estimates of time and memory, and the compute plan. No torch."""
