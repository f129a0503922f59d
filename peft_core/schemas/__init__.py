"""Every data structure that crosses a process boundary, the disk or the wire, defined once. No torch, no I/O."""
