"""Which checkpoint is this? Told in milliseconds, from a little of each file; no torch here."""

import hashlib
import json
import os
from pathlib import Path

from workers.checkpoint_check import INDEX, checkpoint_files
from workers.errors import UserError
from workers.packed_layout import PackedTensor

HEAD_BYTES = 64 * 2**10
SAMPLES = 8
SAMPLE_BYTES = 4096


def checkpoint_fingerprint(folder: Path, tensors: list[PackedTensor]) -> str:
    """32 hexadecimal digits of all that a pack of `tensors` depends on.

    That is which tensors it takes, in which shapes (what config.json says that matters here), and of every file of the
    checkpoint its name, size, time of change, first 64 KiB and eight samples of 4 KiB: where files come out of an
    archive, times alone may be alike.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    digest = hashlib.sha256()
    taken = [[t.name, t.shape, [[s.name, s.shape, s.is_turned] for s in t.sources]] for t in tensors]
    digest.update(json.dumps(taken).encode())
    for path in checkpoint_files(folder):
        try:
            with path.open("rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                digest.update(json.dumps([path.name, status.st_size, status.st_mtime_ns]).encode())
                digest.update(os.pread(file.fileno(), HEAD_BYTES, 0))
                for number in range(SAMPLES):
                    digest.update(os.pread(file.fileno(), SAMPLE_BYTES, status.st_size * number // SAMPLES))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file, though {INDEX} names it; copy the checkpoint again") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()[:32]
