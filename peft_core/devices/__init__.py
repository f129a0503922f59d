"""Whether accelerators compute correctly: what counts as equal, and what was found on this machine. Without torch."""
