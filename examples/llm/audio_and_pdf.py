"""Sounds and PDFs as parts of a prompt, beside texts and in templates; a model that cannot take one is told before.

Ask a model that hears and reads: python audio_and_pdf.py gemini/gemini-3-flash
"""

from __future__ import annotations

import io
import os
import sys
import wave

from diptych import llm

MODEL = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("DIPTYCH_MODEL", "pool/smollm2-135m-instruct")
NEEDS_SCRIPT = True  # the small model reads texts alone
SCRIPT: list[object] = ["Silence.", {"value": 0}]
PDF = b"""%PDF-1.4
1 0 obj <</Type /Catalog /Pages 2 0 R>> endobj
2 0 obj <</Type /Pages /Kids [] /Count 0>> endobj
trailer <</Root 1 0 R>>
%%EOF
"""


def silence(seconds: float) -> bytes:
    """A WAV of one channel, 8,000 samples a second."""
    made = io.BytesIO()
    with wave.open(made, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(2 * int(8000 * seconds)))
    return made.getvalue()


@llm.call(MODEL)
def hear(sound: llm.Media) -> list[str | llm.Media]:
    return ["What do you hear?", sound]


@llm.call(MODEL, output=int, template=llm.Template("USER: {paper:document}How many pages are these?"))
def pages(paper: llm.Media) -> None: ...


def main() -> None:
    sound, paper = llm.audio(data=silence(0.1)), llm.document(data=PDF, name="empty.pdf")
    print(sound.media_type, paper.media_type)
    print(hear(sound).text)
    print(pages(paper).value)
    deaf = hear.with_("anthropic/claude-sonnet-4-5", registry=llm.Registry(keys={"anthropic": "never-sent"}))
    try:
        deaf.request(sound)
    except llm.UsageError as error:
        print("told before anything is sent:", error)


if __name__ == "__main__":
    main()
