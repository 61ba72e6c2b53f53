"""The other side of `reward=remote`: a process that serves rewards over HTTP."""
