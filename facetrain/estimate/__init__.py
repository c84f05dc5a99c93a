"""What a run needs on a cluster: memory, bytes on the wire, seconds; counted from the code that would run."""
