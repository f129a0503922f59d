"""The model that every worker process computes on. Imports torch; the server never imports this package."""
