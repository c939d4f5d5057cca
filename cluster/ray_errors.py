"""What Ray's exceptions say, in one sentence."""

import re

from cluster.errors import one_sentence


def why_dead(error: Exception) -> str:
    """Why an actor's process is no more: the last line that says anything of Ray's long story."""
    text = str(error)
    if "creation task" in text:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return f"its process could not start: {one_sentence(lines[-1], 300)}"
    if re.search(r"out of memory|OOM", text):
        return "its process died, probably for want of memory"
    return "its process died"
