"""What errors say that come within an answer of /v1/responses, in place of one or in the midst of it.

Called by openai_responses_stream.py. Those with an error status are read like all of OpenAI's: failure_words.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from diptych.protos.failures import Failure, FailureKind

from .codec import JsonObject
from .error_bodies import told_by
from .failure_words import failure_of

# Codes of a response's error (types of openai 3.54) that no other format has.
_POLICIES: Final = frozenset({"invalid_prompt", "bio_policy", "cyber_policy"})
_OF_REQUEST: Final = frozenset({"data_residency_mismatch", "empty_image_file", "failed_to_download_image"})


def failure_in(error: JsonObject) -> Failure:
    """Of an `error` event, or of the `error` of a response."""
    inner = error.get("error")
    told = told_by({"error": inner if isinstance(inner, dict) else error})
    found = failure_of(0, {}, replace(told, type="" if told.type == "error" else told.type))
    code = told.code
    if code in _POLICIES or code.endswith("policy_violation"):
        return replace(found, kind=FailureKind.CONTENT_POLICY)
    if code in _OF_REQUEST or code.startswith(("invalid_image", "image_", "unsupported_image", "invalid_base64")):
        return replace(found, kind=FailureKind.BAD_REQUEST)
    return found
