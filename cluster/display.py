"""What `caravan serve` shows while it loads: bars on a terminal, a line a stage elsewhere. All of it on stderr."""

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TaskID, TextColumn

from cluster.stages import Stage, place
from protos import gang_pb2


class LoadingDisplay:
    """Shows stages and each rank's bytes of weights, from construction to `close`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._is_terminal = self._console.is_terminal
        self._stage = ""
        self._note = ""
        self._told: set[str] = set()
        self._epoch = 0
        self._ranks: dict[int, TaskID] = {}
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[state]}"),
            console=self._console,
            transient=True,
            # Else what anybody prints would come out on the console.
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not self._is_terminal,
        )
        self._stage_task = self._progress.add_task("", total=None, state="")
        self._progress.start()

    def stage(self, text: str) -> None:
        """One thing after the other: what is being done now."""
        if text == self._stage:
            return
        self._stage = text
        self._progress.update(self._stage_task, description=text)
        if not self._is_terminal:
            self._console.print(text, soft_wrap=True, highlight=False, markup=False)

    def view(self, view: gang_pb2.GangView) -> None:
        """The gang as its leader sees it."""
        for rank in view.ranks:
            if rank.rank not in self._ranks:
                self._ranks[rank.rank] = self._progress.add_task(f"rank {rank.rank}", total=None, state="")
            loading = rank.loading
            is_packing = loading.bytes_to_pack and not loading.bytes_total
            self._progress.update(
                self._ranks[rank.rank],
                completed=loading.bytes_packed if is_packing else loading.bytes_read,
                total=(loading.bytes_to_pack if is_packing else loading.bytes_total) or None,
                state="packing" if is_packing else rank.state,
            )
            if loading.note and loading.note not in self._told:
                self._told.add(loading.note)
                self.note(loading.note)
        read = sum(rank.loading.bytes_read for rank in view.ranks)
        packing = max((rank.loading.bytes_to_pack for rank in view.ranks if not rank.loading.bytes_total), default=0)
        if view.epoch != self._epoch and self._epoch:
            self.note(view.detail)
        self._epoch = view.epoch
        if view.state == "ready":
            self.stage(f"{len(view.ranks)} ranks are ready; they read {read / 1e6:.1f} MB of weights")
        elif text := _doing(view, packing):
            self.stage(f"{place(view.stage)} {text}")

    def note(self, text: str) -> None:
        """Something a person should know, that stays on the terminal; said once."""
        if text == self._note:
            return
        self._note = text
        self._console.print(f"caravan: {text}", soft_wrap=True, highlight=False, markup=False)

    def close(self) -> None:
        """The bars go away; what comes after has the terminal to itself. Closing twice is fine."""
        self._progress.stop()


def _doing(view: gang_pb2.GangView, packing: int) -> str:
    """What is being done in a stage of a gang's start."""
    fetching = sum(host.bytes_to_fetch - host.bytes_fetched for host in view.hosts)
    texts = {
        Stage.HOSTS_JOINED: f"looking for hosts with room for {len(view.ranks)} ranks",
        Stage.HOSTS_CHECKED: "starting an agent on every host",
        Stage.NETWORK: f"trying every port between {len(view.hosts)} hosts",
        Stage.CHECKPOINT: f"fetching {fetching / 1e6:.0f} MB to hosts"
        if fetching
        else "looking at every host's checkpoint",
        Stage.RANKS_PLACED: f"starting {len(view.ranks)} ranks",
        Stage.WEIGHTS: "loading weights",
        Stage.GROUP: "connecting every rank with every other",
        Stage.FIRST_EXCHANGE: "exchanging the first rows",
    }
    if packing and view.stage == Stage.WEIGHTS:
        return f"packing {packing / 1e6:.1f} MB of weights, once for all starts with this checkpoint"
    return texts[Stage(view.stage)] if view.stage else ""
