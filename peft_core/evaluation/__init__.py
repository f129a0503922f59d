"""The child process that evaluates an adapter which exists already, ours or anyone's."""
