"""Targets, routes and attempts: who answers a request, and what happens when they fail. See README.md."""
