"""Where the wall time of a step goes, part by part."""

import time

PARTS = (
    "schedule",
    "agree",
    "inputs",
    "attention",
    "dense",
    "experts",
    "exchange",
    "head",
    "sample",
    "publish",
)
"""`dense` are dense and shared-expert layers and the embedding, `experts` the expert router and the routed experts,
`agree` waits for the other ranks to open the step, `publish` hands tokens to the token plane."""


class StepClock:
    """Adds up seconds a part: `start()` opens a step, each `lap(part)` gives it the time since the last call,
    `finish()` adds the step to `seconds`. A step that is never finished (nobody had work) counts nowhere.

    On an accelerator work runs behind the calls, so its parts say where the host waited.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        """Of all finished steps."""
        self._step = dict.fromkeys(PARTS, 0.0)
        self._started = self._last = 0.0

    def start(self) -> None:
        self._step = dict.fromkeys(PARTS, 0.0)
        self._started = self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        now = time.perf_counter()
        self._step[part] += now - self._last
        self._last = now

    def finish(self) -> float:
        """Wall seconds of the step."""
        for part, seconds in self._step.items():
            self.seconds[part] += seconds
        return time.perf_counter() - self._started
