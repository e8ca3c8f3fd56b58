"""A small client of the HTTP API: `diptych.connect(url)`. No torch, no ray."""

from .answers import Answer, ChoiceAnswer, Delta, ModelCard, ToolCall
from .asynchronous import AsyncClient
from .client import Client
from .wire import ServerUnreachable, locate

__all__ = [
    "Answer",
    "AsyncClient",
    "ChoiceAnswer",
    "Client",
    "Delta",
    "ModelCard",
    "ServerUnreachable",
    "ToolCall",
    "locate",
]
