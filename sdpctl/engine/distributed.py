"""Several processes that torchrun started for one command: the ranks. This is the only module that knows how they talk.

Rank 0 leads: it runs the command, and it alone has a store and prints. The other ranks follow: they wait for work that rank 0
sends, take part in it, and wait again. Work is sent as plain data: the name of an entry in the followers' table, JSON, and
tensors; no code is sent. Sums over ranks are collective: every rank calls them in the same order.

Two channels join the ranks. The process group moves tensors: gloo on the CPU, NCCL between GPUs. The key-value store of
torchrun carries what must arrive while a collective waits for a rank that is gone: the end of the command, a failure, a signal.
A thread of each rank watches the second channel, so no rank outlives the others:

- rank 0 ends: it writes its exit code, and each follower exits with this code, whatever it waits for;
- a follower fails: it writes its message and exit code, which rank 0 prints and exits with;
- a signal reaches a follower only: the follower passes it on to rank 0, which stops as after its own signal;
- a rank is killed: the next collective of the others fails, or they see that its heartbeat stopped.

Importing this module does not import torch.
"""

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache, partial
from typing import TYPE_CHECKING, Any, NoReturn

from sdpctl.errors import RankError, ResourceError, RunInterruptedError
from sdpctl.signals import STOPPING, heeded

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.distributed import Store  # type: ignore[attr-defined]

PATIENCE = timedelta(minutes=30)
"""How long a rank waits in a collective for the others; a rank that dies is noticed at once, whereas one may hang."""

JOINING = timedelta(minutes=5)
"""How long a rank waits for the key-value store when it starts."""

POLL = 0.1
"""Seconds between two looks of a watching thread."""

SILENT, SIGNALLED_AND_SILENT = 3000, 50
"""Number of looks without a heartbeat after which a rank counts as dead: 5 minutes, or 5 seconds after a signal."""

GRACE = 3.0
"""Seconds for which rank 0 may end by itself after a follower failed, and waits at its end until the followers know of it."""

KEPT = "what was saved is kept, and the same command continues from there"

BUCKET = 2**22
"""Number of gradients that are added up together, 16 MiB in float32."""

STUCK = 25.0
"""Seconds for which rank 0 may go on after torchrun was killed; torchrun kills a process 30 s after a signal."""


@dataclass(frozen=True)
class Launch:
    """The place of this process among those that torchrun started.

    Args:
        rank: number of the process, from 0.
        size: number of processes.
        local_rank: number of the process on its machine, which is the number of its GPU.
        local_size: number of processes on this machine.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int


def launched() -> Launch | None:
    """Return the place of this process among several that torchrun started; None for a single process.

    Raises:
        ResourceError: if the environment says that there are several processes, but not how to reach them.
    """
    env = os.environ
    try:
        size, rank = int(env.get("WORLD_SIZE", "1")), int(env.get("RANK", "0"))
        local_rank, local_size = int(env.get("LOCAL_RANK", rank)), int(env.get("LOCAL_WORLD_SIZE", size))
        port = int(env.get("MASTER_PORT", "0"))
    except ValueError as error:
        raise ResourceError(f"RANK, WORLD_SIZE or MASTER_PORT is not a number ({error}); start with torchrun") from error
    if size == 1:
        return None
    if "RANK" not in env or not 0 <= rank < size or not env.get("MASTER_ADDR") or not port:
        raise ResourceError(
            f"WORLD_SIZE={size} asks for several processes, but RANK, MASTER_ADDR or MASTER_PORT is missing: start with "
            "torchrun, or unset WORLD_SIZE"
        )
    return Launch(rank, size, local_rank, local_size)


def follows() -> bool:
    """Return whether this process is a follower.

    Raises:
        ResourceError: if the environment says that there are several processes, but not how to reach them.
    """
    launch = launched()
    return launch is not None and launch.rank > 0


class Ranks:
    """The ranks of a command, as one of them sees the others. The base class is a single process, for which nothing is sent.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return self.size > 1

    def send(self, work: str, tensors: "Mapping[str, Tensor] | None" = None, **arguments: Any) -> None:
        """Send work to the followers.

        Args:
            work: name of an entry in the followers' table.
            tensors: tensors that the work needs, on any device.
            arguments: plain data that the work needs.
        """

    def add_up(self, tensor: "Tensor") -> None:
        """Replace a tensor by its sum over all ranks; each rank has the same sum afterwards."""

    def begin_adding(self, tensor: "Tensor") -> Callable[[], None]:  # noqa: ARG002
        """Begin to replace a tensor by its sum over all ranks; the returned function waits for the sum."""
        return lambda: None

    def gathered(self, tensor: "Tensor") -> "list[Tensor]":
        """Return a tensor of each rank, in the order of ranks; all have one shape."""
        return [tensor]


ALONE = Ranks()
"""A single process."""


class Group(Ranks):
    """The ranks that torchrun started. The process group is joined with the first work that rank 0 sends, or the first sum.

    Args:
        launch: the place of this process.

    Raises:
        RankError: if the key-value store of torchrun cannot be reached.
    """

    def __init__(self, launch: Launch) -> None:
        from torch.distributed import PrefixStore, TCPStore, rendezvous  # type: ignore[attr-defined]

        super().__init__(launch.rank, launch.size)
        self.launch = launch
        with _reached("the key-value store of torchrun"):
            found: Store = next(rendezvous("env://", launch.rank, launch.size, timeout=JOINING))[0]
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            own = TCPStore(address, port, is_master=False, timeout=JOINING)  # a thread's call must not wait for a different one
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives a restart
        self._store = PrefixStore(f"sdpctl/{attempt}/work", found)
        self.events = _Events(PrefixStore(f"sdpctl/{attempt}/events", own))
        self._sent = 0

    def _join(self) -> None:
        """Join the process group, unless this was done before."""
        import torch
        import torch.distributed as dist

        if dist.is_initialized():
            return
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        if gpus:
            torch.cuda.set_device(self.launch.local_rank % torch.cuda.device_count())
        with _reached("the process group"), _silent_stdout():
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if gpus else "gloo",
                store=self._store,
                rank=self.rank,
                world_size=self.size,
                timeout=PATIENCE,
            )

    def send(self, work: str, tensors: "Mapping[str, Tensor] | None" = None, **arguments: Any) -> None:
        """Send work to the followers, which receive it as soon as they finished the work before."""
        from safetensors.torch import save

        parts = [
            json.dumps(arguments).encode(),
            save({name: tensor.detach().cpu().contiguous() for name, tensor in (tensors or {}).items()}),
        ]
        with _reached("the other processes"):
            self._store.set(f"work/{self._sent}", json.dumps({"work": work, "bytes": list(map(len, parts))}))
        self._sent += 1
        self._join()
        for part in parts:
            self._broadcast(part, len(part))

    def receive(self) -> "tuple[str, dict[str, Any], dict[str, Tensor]]":
        """Wait for work that rank 0 sends, and return its name, its arguments and its tensors."""
        from safetensors.torch import load

        key = f"work/{self._sent}"
        with _reached("rank 0"):
            while not self._store.check([key]):
                time.sleep(POLL / 10)
            header = json.loads(self._store.get(key))
        self._sent += 1
        self._join()
        arguments, tensors = (self._broadcast(None, count) for count in header["bytes"])
        return header["work"], json.loads(arguments), load(tensors)

    def _broadcast(self, content: bytes | None, count: int) -> bytes:
        """Send bytes to every follower, or receive them if `content` is None."""
        import numpy as np
        import torch
        import torch.distributed as dist

        given = np.zeros(count, np.uint8) if content is None else np.frombuffer(content, np.uint8).copy()
        moved = torch.from_numpy(given)
        with _reached("the other processes"):
            dist.broadcast(moved, 0)
        return content if content is not None else given.tobytes()

    def add_up(self, tensor: "Tensor") -> None:
        """Replace a tensor by its sum over all ranks."""
        self.begin_adding(tensor)()

    def begin_adding(self, tensor: "Tensor") -> Callable[[], None]:
        """Begin to replace a tensor by its sum over all ranks; the returned function waits for the sum."""
        import torch.distributed as dist

        self._join()
        with _reached("the other processes"):
            work = dist.all_reduce(tensor, async_op=True)

        def wait() -> None:
            with _reached("the other processes"):
                work.wait()

        return wait

    def gathered(self, tensor: "Tensor") -> "list[Tensor]":
        """Return a tensor of each rank, in the order of ranks."""
        import torch
        import torch.distributed as dist

        self._join()
        own = tensor.contiguous()
        found = [torch.empty_like(own) for _ in range(self.size)]
        with _reached("the other processes"):
            dist.all_gather(found, own)
        return found


class GradientSums:
    """Adds up the gradients of all ranks, bucket by bucket, while the backward pass still computes earlier ones.

    `DistributedDataParallel` sorts its buckets anew after its first step, so three or more ranks would add in a different order
    after a training was resumed. The buckets here never change, and a resumed training ends with the same bits. The hooks are
    on the parameters, so it does not matter how the forward pass is run.

    Args:
        ranks: the ranks; they must run the same instances in each step.
        parameters: the parameters; those without a gradient in a step are left out of it.
        most: maximum number of elements of a bucket, unless a single parameter has more.
    """

    def __init__(self, ranks: Ranks, parameters: "Iterable[Tensor]", *, most: int = BUCKET) -> None:
        self.ranks = ranks
        self._buckets: list[list[Tensor]] = []
        place: dict[Tensor, int] = {}
        elements = most
        for parameter in reversed([p for p in parameters if p.requires_grad]):  # the last gradients are computed first
            if elements + parameter.numel() > most:
                self._buckets.append([])
                elements = 0
            elements += parameter.numel()
            self._buckets[-1].append(parameter)
            place[parameter] = len(self._buckets) - 1
        self._ready = [0] * len(self._buckets)
        self._begun: list[tuple[list[Tensor], Tensor, Callable[[], None]]] = []
        for parameter, number in place.items() if ranks.several else ():
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, number))  # type: ignore[no-untyped-call]

    def _arrived(self, number: int, _: "Tensor") -> None:
        self._ready[number] += 1
        while (nth := len(self._begun)) < len(self._buckets) and self._ready[nth] == len(self._buckets[nth]):
            self._begin(self._buckets[nth])

    def _begin(self, bucket: "list[Tensor]") -> None:
        import torch

        grads = [parameter.grad for parameter in bucket if parameter.grad is not None]
        flat = torch.cat([grad.flatten() for grad in grads]) if grads else torch.empty(0)
        self._begun.append((grads, flat, self.ranks.begin_adding(flat) if grads else lambda: None))

    def finish(self) -> None:
        """Wait until each gradient is the sum of those of all ranks; call it after the backward pass."""
        import torch

        if not self.ranks.several:
            return
        for bucket in self._buckets[len(self._begun) :]:
            self._begin(bucket)
        for grads, flat, wait in self._begun:
            wait()
            for grad, summed in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
                grad.copy_(summed.view(grad.shape))
        self._begun = []
        self._ready = [0] * len(self._buckets)


@contextmanager
def _reached(what: str) -> Iterator[None]:
    """Turn torch's error for a connection that was lost into an error for the user.

    Raises:
        RankError: if torch raises a `RuntimeError` within the block, as all errors of `torch.distributed` are.
    """
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if "out of memory" in reason:
            raise
        raise RankError(f"{what} cannot be reached any more: a process was killed or hangs; {KEPT}") from error


@contextmanager
def _silent_stdout() -> Iterator[None]:
    """Keep what gloo prints about its connections out of standard output, which holds the result only."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


class _Events:
    """What the ranks tell each other beside the work, through the key-value store.

    Args:
        store: a connection that no different thread uses, except at the end.
    """

    def __init__(self, store: "Store") -> None:
        self.store = store
        self.lock = threading.Lock()

    def tell(self, event: str, **content: Any) -> None:
        with self.lock:
            self.store.set(event, json.dumps(content))

    def told(self, event: str) -> dict[str, Any] | None:
        with self.lock:
            if not self.store.check([event]):
                return None
            content: dict[str, Any] = json.loads(self.store.get(event))
            return content


_ENDING = threading.Lock()
_MAIN_ENDS = threading.Event()
"""Set under the lock `_ENDING` once the main thread ends the command, so that no other thread prints a second line."""


@cache
def the_ranks() -> Ranks:
    """Return the ranks of this command; the first call connects to the other processes, if there are any.

    Raises:
        RankError: if the other processes cannot be reached.
        ResourceError: if the environment says that there are several processes, but not how to reach them.
    """
    launch = launched()
    if launch is None:
        return ALONE
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reports connections that end, each with several lines
    return Group(launch)


def lead(failed: Callable[..., None]) -> None:
    """Begin to watch the followers; a single process has none.

    Args:
        failed: shows the user the lines of a follower's error, if this process cannot end by itself.
    """
    ranks = the_ranks()
    if isinstance(ranks, Group):
        signalled, signals = os.pipe()  # a signal is seen even while the main thread waits in a collective
        os.set_blocking(signals, False)
        signal.set_wakeup_fd(signals, warn_on_full_buffer=False)
        threading.Thread(target=_watch_followers, args=(ranks, failed, signalled), daemon=True).start()


class _Heartbeat:
    """Whether a different rank lives. Looks are counted and not seconds, so that all ranks may be stopped for a while."""

    def __init__(self, events: _Events, rank: int) -> None:
        self.events, self.rank = events, rank
        self._last: dict[str, Any] | None = None
        self._silent = 0

    def stopped(self, *, signalled: bool) -> bool:
        """Look at the heartbeat, and return whether it has stopped for long enough."""
        last, self._last = self._last, self.events.told(f"alive/{self.rank}")
        self._silent = self._silent + 1 if self._last == last else 0
        return self._silent > (SIGNALLED_AND_SILENT if signalled else SILENT)


def _watch_followers(ranks: Group, failed: Callable[..., None], signals: int) -> None:
    events, beat, signalled, passed_on = ranks.events, 0, False, False
    heartbeats = [_Heartbeat(events, rank) for rank in range(1, ranks.size)]
    try:
        while True:
            beat += 1
            events.tell("alive/0", beat=beat)
            if (asked := events.told("signal")) is not None and not passed_on:
                passed_on = True
                os.kill(os.getpid(), asked["signum"])
            if (failure := events.told("failed")) is not None:
                return _end_unless_main_does(GRACE, failed, failure["lines"], failure["code"])
            for heartbeat in heartbeats:
                if heartbeat.stopped(signalled=signalled):
                    line = f"rank {heartbeat.rank} was killed or hangs; {KEPT}"
                    return _end_unless_main_does(GRACE, failed, [line], RankError.exit_code)
            if select.select([signals], [], [], POLL)[0]:
                signalled = bool({*os.read(signals, 64)} & {*STOPPING}) or signalled
    except RuntimeError:  # torchrun was killed: stop as after a signal
        os.kill(os.getpid(), signal.SIGTERM)
        return _end_unless_main_does(STUCK, failed, [f"torchrun was killed; {KEPT}"], RankError.exit_code)


def _end_unless_main_does(seconds: float, failed: Callable[..., None], lines: Sequence[str], code: int) -> None:
    if _MAIN_ENDS.wait(seconds):
        return
    with _ENDING:
        if not _MAIN_ENDS.is_set():
            failed(*lines)
            os._exit(code)


def _main_ends() -> None:
    with _ENDING:
        _MAIN_ENDS.set()


def blamed(error: Exception, lines: Sequence[str], code: int) -> tuple[Sequence[str], int]:
    """Return the lines and the exit code of an error; if a follower's failure caused it, those of the failure.

    No other thread ends this process from now on.
    """
    ranks = _known()
    if ranks is None:
        return lines, code
    _main_ends()
    if not isinstance(error, RankError | RunInterruptedError):
        return lines, code
    try:
        failure = ranks.events.told("failed")  # it is told before the follower ends
    except RuntimeError:
        failure = None
    return (lines, code) if failure is None else (failure["lines"], failure["code"])


def _known() -> Group | None:
    """Return the ranks if this process is connected to them."""
    ranks = the_ranks() if the_ranks.cache_info().currsize else ALONE
    return ranks if isinstance(ranks, Group) else None


def dismiss(ended: str | int | None) -> None:
    """End the followers with the exit code of this command, and end this process; a single process returns."""
    ranks = _known()
    if ranks is None:
        return
    code = ended if isinstance(ended, int) else int(ended is not None)
    _main_ends()
    try:
        ranks.events.tell("end", code=code)
        deadline = time.monotonic() + (0 if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else GRACE)
        while time.monotonic() < deadline:  # this process hosts the key-value store
            if all(ranks.events.told(f"left/{rank}") for rank in range(1, ranks.size)) or ranks.events.told("failed"):
                break
            time.sleep(POLL / 10)
    except RuntimeError:  # nobody is left
        pass
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # NCCL's threads may wait for ranks that are gone


def follow(works: Callable[[Group], None], explained: Callable[[Exception], tuple[Sequence[str], int]]) -> NoReturn:
    """Follow rank 0 until it ends; then exit with its code. Nothing is printed, except that rank 0 cannot be reached.

    Args:
        works: receives work and does it, until it fails.
        explained: returns the lines of an error and its exit code.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, heeded())  # the watching thread sees what is pending
    try:
        ranks = the_ranks()
        assert isinstance(ranks, Group)
    except Exception as error:  # noqa: BLE001  rank 0 does not know of it
        lines, code = explained(error)
        sys.stderr.write("".join(f"sdpctl: {line}\n" for line in lines))
        sys.stderr.flush()
        os._exit(code)
    if not os.environ.get("SDPCTL_DEBUG"):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    threading.Thread(target=_watch_leader, args=(ranks,), daemon=True).start()
    try:
        works(ranks)
        code = 0
    except RankError as error:  # rank 0 ended, or finds out by itself
        code = _code_of_rank_0(ranks, error.exit_code)
    except Exception as error:  # rank 0 prints it
        if os.environ.get("SDPCTL_DEBUG"):
            raise
        lines, code = explained(error)
        _told_or_not(ranks, "failed", lines=[f"rank {ranks.rank}: {line}" for line in lines], code=code)
    os._exit(code)


def _code_of_rank_0(ranks: Group, otherwise: int) -> int:
    try:
        end = ranks.events.told("end")
    except RuntimeError:
        end = None
    return otherwise if end is None else int(end["code"])


def _told_or_not(ranks: Group, event: str, **content: Any) -> None:
    try:
        ranks.events.tell(event, **content)
    except RuntimeError:  # nobody is left to read it
        return


def _watch_leader(ranks: Group) -> None:
    """Exit with the code of rank 0 when it ends, or when it shows no sign of life."""
    events, beat = ranks.events, 0
    signum: int | None = None
    heartbeat = _Heartbeat(events, 0)
    try:
        while True:
            if (end := events.told("end")) is not None:
                events.tell(f"left/{ranks.rank}", code=end["code"])
                os._exit(end["code"])
            beat += 1
            events.tell(f"alive/{ranks.rank}", beat=beat)
            if heartbeat.stopped(signalled=signum is not None):
                break
            if signum is None and (pending := signal.sigpending() & {*heeded()}):
                signum = min(pending)
                events.tell("signal", signum=signum)
            time.sleep(POLL)
    except RuntimeError:  # torchrun is gone, and with it the key-value store
        pass
    os._exit(RankError.exit_code if signum is None else 128 + signum)


def device_of_rank(name: str) -> "torch.device | None":
    """Return the GPU of this rank for a device's name; None for a single process, or if no GPU is meant.

    Raises:
        ResourceError: if a certain GPU is named, or this machine has fewer GPUs than processes.
    """
    import torch

    launch = launched()
    if launch is None or name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return None
    if ":" in name:
        raise ResourceError(f"device={name} is one GPU for {launch.local_size} processes; set device=cuda: each takes its own")
    if torch.cuda.is_available() and (there := torch.cuda.device_count()) < launch.local_size:
        raise ResourceError(
            f"{launch.local_size} processes need as many GPUs, and this machine has {there}; start with "
            f"--nproc-per-node={there}, or set device=cpu"
        )
    return torch.device("cuda", launch.local_rank)
