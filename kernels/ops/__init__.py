"""Operations of the forward pass, a folder each: `reference.py` defines the op, callers import `launch.py`."""
