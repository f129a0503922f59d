"""What the processes that compute share: training and inference. Imports torch; never imported by the server."""
