"""schemathesis, all phases, over the API's own description: no 5xx, and no answer that is not described (exam row R28).

Few examples here; `make fuzz` makes as many as the exam asks for and dates its report.
"""

from __future__ import annotations

import pytest
from api_fuzz import fuzz

from diptych.cluster.api.description.document import operations

pytest.importorskip("schemathesis", reason="comes with the clients that `make test-slow` installs")
# With one echo model that generates there is no valid request to these.
WITHOUT_A_MODEL = {"createEmbedding", "rerank", "rerankV2"}
# Reached through what the operations before them answered, which a short run does not always do.
BY_LINKS = ("{id}", "{name}", "/v1/batches")


@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_no_request_makes_a_server_error_or_an_answer_that_is_not_described() -> None:
    outcome = await fuzz(10, seed=1)
    assert outcome.code == 0, outcome.output[-20_000:]
    for one in operations():
        label = f"{one.method} {one.path}"
        answers = outcome.counts.get(label, {})
        assert answers, label
        assert not [status for status in answers if status >= 500], (label, answers)
        if one.id not in WITHOUT_A_MODEL and not any(part in one.path for part in BY_LINKS):
            assert answers.get(200), (label, answers)
    assert outcome.orders > 100
