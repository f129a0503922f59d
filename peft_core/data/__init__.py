"""Training data: source -> code units -> examples -> held-out split. No torch."""
