"""The verbs `diptych bench offline` and `diptych bench serve`. They print figures; the judgement is the reader's."""
