"""Placement policies, one per file, each a small class that follows placement.PlacementPolicy."""
