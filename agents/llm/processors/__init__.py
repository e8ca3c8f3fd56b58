"""What looks at a conversation on its way to a model and back: see Processor; and those that are built in."""

from .moderation import Moderation
from .pii import RedactPII
from .processor import Processor, ProcessorContext, with_texts
from .schema import CheckSchema
from .secrets import RedactSecrets
from .text import Normalise

__all__ = [
    "CheckSchema",
    "Moderation",
    "Normalise",
    "Processor",
    "ProcessorContext",
    "RedactPII",
    "RedactSecrets",
    "with_texts",
]
