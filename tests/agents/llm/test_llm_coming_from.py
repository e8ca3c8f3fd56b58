"""docs/coming-from-mirascope-and-instructor.md is complete and true: each capability has its row, each name of ours is
there, each of our halves of a pair runs.

Guards against a page that promises what was renamed, or forgets what its readers look for.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import uuid
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from diptych.agents import llm
from diptych.agents.llm import registry, testing

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "coming-from-mirascope-and-instructor.md"
TEXT = PAGE.read_text()
BLOCK = re.compile(r"(?:<!-- (script|wrap): (.*?) -->\n)?```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


TABLES = [cells_of(line) for line in TEXT.splitlines() if line.startswith("|")]
ROWS = {row[0]: row for row in TABLES if re.fullmatch(r"[IM]\d+", row[0])}
# What a reader searches for: of each capability, its names there.
NAMES = {
    "I1": "response_model _raw_response",
    "I2": "from_openai from_anthropic instructor.patch",
    "I3": "generics",
    "I4": "BatchProcessor submit_batch get_batch_status retrieve_results filter_successful filter_errors cancel_batch",
    "I5": "InstructorRetryException failed_attempts n_attempts total_usage last_completion create_kwargs",
    "I6": "strict=False",
    "I7": "max_retries Retrying AsyncRetrying",
    "I8": "create_partial Partial[M]",
    "I9": "from_provider from_litellm KnownModelName",
    "I10": "TOOLS TOOLS_STRICT JSON JSON_SCHEMA MD_JSON PARALLEL_TOOLS RESPONSES_TOOLS",
    "I11": "create_iterable Iterable Literal Enum Union",
    "I12": "client.on client.off client.clear Hooks completion:kwargs completion:response completion:error "
    "completion:last_attempt completion:usage parse:error",
    "I13": "AsyncInstructor async_client create_with_completion",
    "I14": "context= validation_context= jinja llm_validator openai_moderation",
    "I15": "Image.from_url from_path from_base64 autodetect_images Audio PDF ImageWithCacheControl",
    "I16": "AutoCache DiskCache cache_ttl cache_namespace",
    "I17": "batch jobs files usage",
    "I18": "Instructions.distil FinetuneFormat",
    "I19": "Maybe CitationMixin",
    "I20": "token_budget TokenBudgetExceeded",
    "I21": "TypedDict Required NotRequired",
    "M1": "provider= default_model f.stream f.call f.prompt",
    "M2": "Messages.System Messages.User prompt_template BaseMessageParam BasePrompt UserMessage llm.prompt",
    "M3": "OpenAICallParams AnthropicCallParams CommonCallParams Params thinking",
    "M4": "CallResponse content usage finish_reasons response message_param user_message_param cost text() thoughts "
    "tool_calls raw messages pretty() parse() validate()",
    "M5": "history tool_message_params resume execute_tools ToolOutput ToolExecutionError ToolNotFoundError",
    "M6": "response_model json_mode _response format= llm.format",
    "M7": "Stream StructuredStream text_stream streams structured_stream finish Partial StreamRestarted",
    "M8": "BaseTool BaseToolKit toolkit_tool llm.tool Toolkit WebSearchTool",
    "M9": "retry collect_errors fallback max_retries fallback_models retry_failures RetriesExhausted",
    "M10": "llm.override llm.context BaseDynamicConfig client= llm.model use_model register_provider",
    "M11": "async computed_fields",
    "M12": "ImagePart AudioPart DocumentPart CacheControlPart Image.from_url from_file Audio Document Thought "
    "include_thoughts",
    "M13": "with_langfuse with_logfire with_otel calculate_cost ops.configure ops.instrument_llm ops.trace ops.version "
    "ops.session",
    "M14": "stdio_client sse_client streamable_http_client",
    "M15": "llm.Context",
    "M16": "output_parser",
    "M17": "ProviderError APIError AuthenticationError PermissionError BadRequestError NotFoundError RateLimitError "
    "ServerError ParseError ToolError FeatureNotSupportedError",
    "M18": "FiniteStateMachine rag realtime",
    "M19": "FromCallArgs",
    "M20": "typescript",
}


def test_every_capability_has_its_row_with_its_names() -> None:
    assert ROWS.keys() == NAMES.keys()
    missing = {
        row: [name for name in names.split() if name not in " | ".join(ROWS[row])] for row, names in NAMES.items()
    }
    assert not {row: names for row, names in missing.items() if names}


def test_every_name_of_ours_is_there() -> None:
    ours = [cell for row in TABLES for cell in (row[2:] if row[0].startswith("I") else row[-1:])]
    different = [row[1] for row in TABLES if len(row) == 3]
    told = " ".join([*ours, *different, *(line for line in TEXT.splitlines() if line.startswith("- "))])
    found = set(re.findall(r"\bllm\.([A-Za-z_]+)", told))
    assert len(found) > 40
    assert found - set(llm.__all__) == set()


def test_every_link_leads_to_a_file() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (PAGE.parent / link).exists()] == []


def blocks() -> list[Any]:
    made = []
    for found in BLOCK.finditer(TEXT):
        line = TEXT[: found.start(3)].count("\n") + 1
        made.append(pytest.param(found[1], found[2], found[3], id=f"line {line}"))
    return made


def completion(text: str) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return {"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


def ran(code: str, file: Path, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a module of its own: forward references and versions look for one."""
    file.write_text(f"from diptych.agents import llm\n\n{code}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, module)
    module.openai_client = client  # type: ignore[attr-defined]
    spec.loader.exec_module(module)


@pytest.mark.parametrize(("kind", "script", "code"), blocks())
def test_our_half_of_each_pair_runs(
    kind: str | None, script: str | None, code: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entries = eval(script, {**vars(testing), "__builtins__": {}}) if script else []
    left = list(entries)
    model = testing.ScriptedModel([] if kind == "wrap" else entries)
    own = testing.registry_of(pool=model, other=model)
    monkeypatch.setattr(registry, "_default", own)
    monkeypatch.chdir(tmp_path)

    def answer(request: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, json=completion(left.pop(0)))

    with openai.OpenAI(
        base_url="http://127.0.0.1/v1", api_key="k", http_client=httpx2.Client(transport=httpx2.MockTransport(answer))
    ) as client:
        ran(code, tmp_path / f"pair_{uuid.uuid4().hex}.py", client, monkeypatch)
    assert model.left == 0
    assert kind != "wrap" or not left
