"""The public HTTP API of a router replica. No torch, no transformers, no ray."""
