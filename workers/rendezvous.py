"""Where the processes of one epoch find each other: a store the gang's leader hosts, a fresh one for every epoch."""

from datetime import timedelta

from torch.distributed import TCPStore


class RendezvousStore:
    """A TCP store on `host`, at a port the system chooses. `close` it once its epoch is over."""

    def __init__(self, host: str) -> None:
        self._store: TCPStore | None = TCPStore(
            host, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30)
        )
        self.address = f"{host}:{self._store.port}"

    def close(self) -> None:
        # The server ends with its last reference.
        self._store = None


def connect(address: str, timeout_s: float) -> TCPStore:
    """Join the store at HOST:PORT.

    Raises:
        RuntimeError: nobody answered in `timeout_s`.
    """
    host, _, port = address.rpartition(":")
    return TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
