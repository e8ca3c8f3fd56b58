"""Running steps on an accelerator: state by slot on the device, inputs built there, nothing read back before it is due."""
