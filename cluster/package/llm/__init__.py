"""Typed calls of language models: `from diptych import llm`.

Published as `diptych/llm`: the names of `diptych.agents.llm`, and nothing of its own. There is no second copy of a
module: what is imported from here is the same object as what is imported from there.
"""

from diptych.agents.llm import *  # noqa: F403  exactly what its __all__ lists
from diptych.agents.llm import __all__ as __all__
