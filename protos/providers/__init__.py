"""Wire formats of outside providers, from canonical requests and to canonical answers."""
