"""A small client of the HTTP API: `diptych.connect(url)`. No torch, no ray."""

from .answers import Answer, ChoiceAnswer, Delta, ModelCard
from .asynchronous import AsyncClient
from .client import Client
from .wire import ServerUnreachable, locate

__all__ = ["Answer", "AsyncClient", "ChoiceAnswer", "Client", "Delta", "ModelCard", "ServerUnreachable", "locate"]
