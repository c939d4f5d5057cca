"""Stop strings: nothing of one is ever shown, nothing else waits longer than it must."""

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """The stop strings of one request as an Aho-Corasick automaton: one table look-up a character.

    States are the prefixes of the stop strings; the current state is the longest one the text ends with.

    Args:
        strings: none empty.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fallback: list[int] = [0]
        depth = [0]
        # Characters of the longest stop string that ends in this state; 0: none does.
        self._match: list[int] = [0]
        for string in strings:
            state = 0
            for char in string:
                if char not in self._next[state]:
                    self._next[state][char] = len(self._next)
                    self._next.append({})
                    self._fallback.append(0)
                    depth.append(depth[state] + 1)
                    self._match.append(0)
                state = self._next[state][char]
            self._match[state] = len(string)
        # Characters at the end of the text that may still become part of a stop string.
        self._held: list[int] = [0] * len(depth)
        queue = deque([0])
        while queue:
            state = queue.popleft()
            fallback = self._fallback[state]
            if state:
                self._match[state] = self._match[state] or self._match[fallback]
                self._held[state] = depth[state] if self._next[state] else self._held[fallback]
            for char, child in self._next[state].items():
                self._fallback[child] = self.step(fallback, char) if state else 0
                queue.append(child)

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        while True:
            following = self._next[state].get(char)
            if following is not None:
                return following
            if not state:
                return 0
            state = self._fallback[state]

    def match(self, state: int) -> int:
        """Characters of the longest stop string that ends here; 0: none does."""
        return self._match[state]

    def held(self, state: int) -> int:
        """Characters at the end of the text that may still become part of a stop string."""
        return self._held[state]


class StopMatcher:
    """Follows one output. The stop string that is complete first ends it; of those that end together, the longest."""

    def __init__(self, strings: StopStrings) -> None:
        self._strings = strings
        self._state = 0
        self._waiting = ""
        self.stopped = False

    def push(self, text: str, may_stop: bool) -> str:
        """Takes new text and returns what is safe to show.

        Args:
            text: new text.
            may_stop: false while a stop string must not end the output: it is then text like any other.
        """
        strings = self._strings
        state = self._state
        waiting = self._waiting + text
        seen = len(self._waiting)
        for i, char in enumerate(text, start=1):
            state = strings.step(state, char)
            if may_stop and strings.match(state):
                self.stopped = True
                self._waiting = ""
                return waiting[: seen + i - strings.match(state)]
        self._state = state
        safe = len(waiting) - strings.held(state)
        self._waiting = waiting[safe:]
        return waiting[:safe]

    def finish(self) -> str:
        """What was held back, when no more text comes."""
        text, self._waiting = self._waiting, ""
        return text
