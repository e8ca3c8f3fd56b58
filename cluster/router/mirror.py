"""What a router knows of the engines' prefix caches: the names of the blocks that each one holds, cut to 8 bytes.

The chain of a prompt's block names is kvtransfer's own; it is computed as far as some mirror knows it, once per
(root, block size). A mirror may lag behind its engine by some 100 ms: it serves estimates, never correctness.
"""

from __future__ import annotations

from collections.abc import Iterable

from diptych.kvtransfer.prefix import block_name, root_name, short_name


class PromptNames:
    """The names of one prompt's full blocks under a salt, computed when they are asked for."""

    def __init__(self, prompt: tuple[int, ...], salt: bytes) -> None:
        self.num_tokens = len(prompt)
        self._prompt = prompt
        self._salt = salt
        self._chains: dict[tuple[bytes, int], tuple[list[bytes], list[int]]] = {}

    def shared_tokens(self, names: set[int], root: bytes, block_tokens: int) -> int:
        """Tokens of the longest run of blocks, from the prompt's start, that are all in `names`."""
        parents, chain = self._chains.setdefault((root, block_tokens), ([], []))
        if not parents:
            parents.append(root_name(root, self._salt))
        count = 0
        for start in range(0, self.num_tokens - block_tokens + 1, block_tokens):
            if count == len(chain):
                parents[0] = block_name(parents[0], self._prompt[start : start + block_tokens])
                chain.append(short_name(parents[0]))
            if chain[count] not in names:
                break
            count += 1
        return count * block_tokens


class PrefixMirror:
    """One engine's. Empty until the engine has told everything, and again when the session to it breaks."""

    def __init__(self) -> None:
        self.root = b""  # of the engine's names; empty: it keeps no prefix
        self.block_tokens = 1
        self.names: set[int] = set()

    def begin(self, root: bytes, block_tokens: int) -> None:
        """A new session."""
        self.root = root
        self.block_tokens = block_tokens
        self.names = set()

    def apply(self, *, reset: bool, added: Iterable[int], removed: Iterable[int]) -> None:
        """One message of the engine; they come in order."""
        if reset:
            self.names = set()
        self.names.difference_update(removed)
        self.names.update(added)

    def cached_tokens(self, prompt: PromptNames) -> int:
        """Of the prompt, what the engine need not compute: whole blocks."""
        if not self.names or not self.root:
            return 0
        return prompt.shared_tokens(self.names, self.root, self.block_tokens)
