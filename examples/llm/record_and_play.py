"""Answers of a real model, recorded once into a file and played in tests: the same replies, without the model.

Keys are not written. A request that differs from the recorded one is refused with the difference.
"""

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from diptych import llm
from diptych.llm.testing import CassetteMismatch, Player, Recorder, registry_of

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
SCRIPT = ["A heron stands in the reeds.", "It waits."]


@llm.call(MODEL, max_tokens=20, temperature=0.0)
def sentence(about: str) -> str:
    return f"A sentence about {about}."


def main() -> None:
    prefix = MODEL.partition("/")[0]
    with TemporaryDirectory() as folder:
        cassette = Path(folder) / "heron.jsonl"
        real, _ = llm.default_registry().resolve(MODEL)
        with llm.using(registry=registry_of({prefix: Recorder(real, cassette)})):
            recorded = [sentence("a heron").text, "".join(sentence.stream("a heron").text())]

        player = Player(cassette)
        with llm.using(registry=registry_of({prefix: player})):
            played = [sentence("a heron").text, "".join(sentence.stream("a heron").text())]
            assert played == recorded
            assert player.left == 0
            print(played)
            try:
                sentence("a stork")
            except CassetteMismatch as exc:
                print(exc)


if __name__ == "__main__":
    main()
