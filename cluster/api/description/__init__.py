"""What the HTTP API is, declared once: every operation, field, bound, answer and error. README.md tells how."""
