"""What outlives a router: see README.md."""
