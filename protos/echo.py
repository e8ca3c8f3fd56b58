"""The token ids of the echo model, which its tokenizer, its runner and those who check its answers agree on.

| 0 .. 31999: the words t0 .. t31999 | 256 bytes, for any other text | END, BAD, STOP and the roles of a chat |
"""

from __future__ import annotations

ECHO = "echo"  # the model's name as a source
NUM_WORDS = 32_000  # token 17 is the word t17; answers consist of words
FIRST_BYTE = NUM_WORDS  # the byte b is token FIRST_BYTE + b
END = FIRST_BYTE + 256  # ends an answer
BAD = END + 1  # the answer of who read KV that is not what was computed for these positions, in no other case sampled
STOP = END + 2  # STOP tN in a prompt: END follows when N more positions are filled
SYSTEM, USER, ASSISTANT = END + 3, END + 4, END + 5
VOCAB_SIZE = END + 6
MAX_CONTEXT_TOKENS = 32_768
NAMES = {END: "<end>", BAD: "<bad>", STOP: "<stop>", SYSTEM: "<system>", USER: "<user>", ASSISTANT: "<assistant>"}
