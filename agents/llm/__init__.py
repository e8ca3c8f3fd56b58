"""Typed calls of language models: `from diptych import llm`."""

from diptych.protos.messages import Media, Message, Text

from .agent import Agent
from .agent_events import (
    AgentEvent,
    AgentStep,
    Delegated,
    HandedOff,
    Paused,
    Run,
    RunEnded,
    TextDelta,
    ThoughtDelta,
    ToolBegan,
    ToolEnded,
    TurnBegan,
)
from .agent_limits import Limits
from .agent_state import AgentState, Pending
from .agent_streams import AgentStream
from .attempts import Attempt
from .batch import BatchJob, batch, batch_begin, batch_list, batch_resume
from .batch_places import BatchStatus
from .batch_results import BatchResult, BatchResults
from .cache import Cache
from .call import Call, call
from .call_log import CallLog, read_log
from .conversation import assistant, system, user
from .draft import Draft
from .errors import (
    Blocked,
    BudgetExceeded,
    CallFailed,
    DefinitionError,
    EmptyAnswer,
    Error,
    InvalidOutput,
    ProviderError,
    Refused,
    ToolFailed,
    Truncated,
    Unsupported,
    UsageError,
)
from .handoff import Handoff, without_tool_turns
from .hooks import AnswerCame, AttemptFailed, CallEnded, HookEvent, Hooks, RequestBegan, ToolRan, ValueInvalid, on
from .limiter import Limiter
from .maybe import Maybe
from .mcp import McpServer, mcp
from .outcomes import Deferred, Failed, NeedsApproval, Ok, Outcome, Retry, ToolOutcome, result
from .params import Params
from .partial import Partial
from .parts import audio, document, image, kept, text
from .processors import (
    CheckSchema,
    Moderation,
    Normalise,
    Processor,
    ProcessorContext,
    RedactPII,
    RedactSecrets,
    with_texts,
)
from .prompt import Prompt, prompt
from .registry import Cluster, Registry, default_registry, using
from .reply import UNSET, Reply, Unset
from .reports import FieldError, Report
from .retries import Budget, Retries
from .streams import Finished, Restarted, Stream
from .templates import Template
from .tool_context import INJECTED, Context
from .toolkits import Toolkit
from .tools import Tool, tool
from .tracing import Tracing
from .usage import PriceList, Spent
from .wrap import AsyncWrapped, WrapHooks, Wrapped, wrap

__all__ = [
    "Agent",
    "AgentEvent",
    "AgentState",
    "AgentStep",
    "AgentStream",
    "AnswerCame",
    "AsyncWrapped",
    "Attempt",
    "AttemptFailed",
    "BatchJob",
    "BatchResult",
    "BatchResults",
    "BatchStatus",
    "Blocked",
    "Budget",
    "BudgetExceeded",
    "Cache",
    "Call",
    "CallEnded",
    "CallFailed",
    "CallLog",
    "CheckSchema",
    "Cluster",
    "Context",
    "Deferred",
    "DefinitionError",
    "Delegated",
    "Draft",
    "EmptyAnswer",
    "Error",
    "Failed",
    "FieldError",
    "Finished",
    "HandedOff",
    "Handoff",
    "HookEvent",
    "Hooks",
    "INJECTED",
    "InvalidOutput",
    "Limiter",
    "Limits",
    "Maybe",
    "McpServer",
    "Media",
    "Message",
    "Moderation",
    "NeedsApproval",
    "Normalise",
    "Ok",
    "Outcome",
    "Params",
    "Partial",
    "Paused",
    "Pending",
    "Processor",
    "ProcessorContext",
    "PriceList",
    "Prompt",
    "ProviderError",
    "RedactPII",
    "RedactSecrets",
    "Refused",
    "Registry",
    "Reply",
    "Report",
    "RequestBegan",
    "Restarted",
    "Retries",
    "Retry",
    "Run",
    "RunEnded",
    "Spent",
    "Stream",
    "Template",
    "Text",
    "TextDelta",
    "ThoughtDelta",
    "Tool",
    "ToolBegan",
    "ToolEnded",
    "ToolFailed",
    "ToolOutcome",
    "ToolRan",
    "Toolkit",
    "Tracing",
    "Truncated",
    "TurnBegan",
    "UNSET",
    "Unset",
    "Unsupported",
    "UsageError",
    "ValueInvalid",
    "WrapHooks",
    "Wrapped",
    "assistant",
    "audio",
    "batch",
    "batch_begin",
    "batch_list",
    "batch_resume",
    "call",
    "default_registry",
    "document",
    "image",
    "kept",
    "mcp",
    "on",
    "prompt",
    "read_log",
    "result",
    "system",
    "text",
    "tool",
    "user",
    "using",
    "with_texts",
    "without_tool_turns",
    "wrap",
]
