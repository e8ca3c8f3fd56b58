"""The verbs `diptych bench offline`, `serve` and `kernels`. They print figures; the judgement is the reader's."""
