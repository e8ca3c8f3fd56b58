"""Models for tests of programs: `from diptych.llm.testing import ScriptedModel`.

The names of `diptych.agents.llm.testing`.
"""

from diptych.agents.llm.testing import *  # noqa: F403  exactly what its __all__ lists
from diptych.agents.llm.testing import __all__ as __all__
