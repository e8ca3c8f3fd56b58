"""The tools of an MCP server as a toolkit: pip install 'diptych[mcp]'. The server here is this file, in a process."""

from __future__ import annotations

import os
import sys

from diptych import llm
from diptych.llm.testing import tool_call

IS_SERVER = sys.argv[1:] == ["--serve"]
MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT: list[object] = [tool_call("notes_search", word="tea"), "You wrote that tea is in the red tin."]


def serve() -> None:
    from mcp.server.mcpserver import MCPServer

    server = MCPServer("notes", log_level="ERROR")

    @server.tool()
    def search(word: str) -> list[str]:
        """Finds notes with a word in them."""
        return [note for note in ("tea is in the red tin", "call Ann") if word in note]

    server.run()


@llm.call(MODEL, max_tokens=60)
def ask(question: str) -> str:
    return question


def main() -> None:
    with llm.mcp(command=[sys.executable, __file__, "--serve"], timeout=20) as kit:
        call = ask.with_(tools=[kit.prefixed("notes_")])
        reply = call("Where is the tea?")
        if reply.tool_calls:
            outcomes = reply.run_tools()
            print(*(one.outcome for one in outcomes), sep="\n")
            reply = reply.resume(outcomes, tool_choice="none")
        print(reply.text)


if __name__ == "__main__":
    serve() if IS_SERVER else main()
