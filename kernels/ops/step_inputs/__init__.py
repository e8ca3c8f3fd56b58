"""A step's inputs, made on the device from its wire and the state of its slots; its tokens, taken into that state."""
