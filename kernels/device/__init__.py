"""Steps on an accelerator: state by slot lives there, inputs are built there, and nothing is read before it is due."""
