"""Ways for the bytes of a slot to reach a decode engine: local (one process), shm (one host), grpc (anywhere)."""
