"""Where the processes of one epoch find each other: a store the gang's leader hosts, a fresh one for every epoch."""

from datetime import timedelta

from torch.distributed import TCPStore

from workers.ports import PortRange, bind_port, join_address, split_address


class RendezvousStore:
    """A TCP store on `host` alone, at the first free port of `ports` (None: any). `close` it once its epoch is over.

    Raises:
        UserError: no port is free.
    """

    def __init__(self, host: str, ports: PortRange | None = None) -> None:
        listener = bind_port(ports, host, "store_ports")
        port = listener.getsockname()[1]
        # Left to itself it would listen on every address of the host.
        self._store: TCPStore | None = TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=30),
            master_listen_fd=listener.detach(),
        )
        self.address = join_address(host, port)

    def close(self) -> None:
        # The server ends with its last reference.
        self._store = None


def connect(address: str, timeout_s: float) -> TCPStore:
    """Join the store at HOST:PORT.

    Raises:
        RuntimeError: nobody answered in `timeout_s`.
    """
    host, port = split_address(address)
    return TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
