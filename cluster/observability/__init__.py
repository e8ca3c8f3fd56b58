"""Metrics and spans of a router replica. Libraries use the OpenTelemetry API only."""
