"""A linear layer over a weight that was brought into the device's best form once."""
