"""Every shape that crosses a process, the disk or the wire, defined once. No torch, no I/O."""
