"""Models for tests: scripted, echoing, recorded; and a switch that keeps tests from real ones.

Published as `diptych.llm.testing`. Nothing here patches anything: each is an upstream like any other, and a registry
leads to it.
"""

from ..network import NetworkForbidden, forbid_network
from .cassettes import CassetteMismatch, Player, Recorder
from .echo import EchoModel, echoed
from .minimal import NoMinimal, minimal
from .registries import registry_of
from .scripted import Entry, Said, ScriptedModel, ScriptExhausted, cut, failure, tool_call

__all__ = [
    "CassetteMismatch",
    "EchoModel",
    "Entry",
    "NetworkForbidden",
    "NoMinimal",
    "Player",
    "Recorder",
    "Said",
    "ScriptExhausted",
    "ScriptedModel",
    "cut",
    "echoed",
    "failure",
    "forbid_network",
    "minimal",
    "registry_of",
    "tool_call",
]
