"""Root mean square normalisation of the last dimension."""
