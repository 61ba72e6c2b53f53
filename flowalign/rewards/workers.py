"""Rewards in worker processes: for rewards that are CPU-bound, hold the GIL, or may crash."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from flowalign.rewards.base import Reward, RewardError

log = logging.getLogger("flowalign")


class InWorkers:
    """Distributes the batches of a reward of media among worker processes.

    A chunk whose process dies or takes longer than `timeout` is retried once in a new one; then its scores are NaN.
    The reward must be picklable. If given as a class with its arguments (`_partial_: true`), it is created only in the
    workers.
    """

    def __init__(
        self,
        reward: Reward | Callable[..., Reward],
        workers: int = 2,
        chunk: int = 8,
        timeout: float = 600.0,
        threads: int = 1,
    ) -> None:
        """chunk: samples that a process scores at a time, all of them for groupwise rewards; timeout: seconds for a
        chunk, including the start of the process; threads: torch threads per process.
        """
        for name, value in (("workers", workers), ("chunk", chunk), ("timeout", timeout), ("threads", threads)):
            if value <= 0:
                raise ValueError(f"{name} must be positive (got {value}).")
        kind = reward.func if isinstance(reward, partial) else reward
        if getattr(kind, "sees", "media") != "media":
            raise ValueError(f"{getattr(kind, '__name__', kind)} scores latents, which stay with the policy.")
        try:
            packed = pickle.dumps(reward)
        except Exception as error:
            raise ValueError(
                f"{getattr(kind, '__name__', kind)} cannot be sent to a process ({error}): give its class with "
                "_partial_: true, or define it in a module."
            ) from error
        self.groupwise = bool(getattr(kind, "groupwise", False))
        self.chunk = chunk
        self._workers = [Worker(packed, timeout, threads) for _ in range(workers)]
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._pool = ThreadPoolExecutor(workers, "workers")
        self._finalizer = weakref.finalize(self, _end_all, self._workers)

    def __call__(self, media: Tensor, prompts: list[str], metadata: list[dict[str, Any]], **compared: Tensor) -> Tensor:
        """See `Reward`; media are sent as float32."""
        size = len(prompts) if self.groupwise else self.chunk
        rows = [slice(i, i + size) for i in range(0, len(prompts), size)]
        pixels, extra = media.detach().float().cpu(), {name: t.cpu().numpy() for name, t in compared.items()}
        chunks = [("score", (pixels[r].numpy(), prompts[r], metadata[r], extra)) for r in rows]
        try:
            return torch.cat([torch.as_tensor(part) for part in self._pool.map(self._score_chunk, chunks)])
        except (KeyboardInterrupt, SystemExit):
            self.close()  # at exit the interpreter waits for the threads, and these for the processes
            raise

    def self_check(self) -> None:
        """Run the reward's self-check in a worker, which also tests that one can be started. Raises RewardError."""
        worker = self._idle.get()
        try:
            worker.ask("self_check", ())
        except WorkerDiedError as error:
            raise RewardError(f"its worker {error}.") from error
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """Terminate the processes."""
        self._finalizer()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _score_chunk(self, request: tuple[str, tuple[Any, ...]]) -> Any:
        number = len(request[1][1])
        for outlook in ("they are scored again", "they have no score"):
            worker = self._idle.get()
            try:
                return worker.ask(*request)
            except WorkerDiedError as error:
                log.warning("a worker that scored %d samples %s: %s.", number, error, outlook)
            finally:
                self._idle.put(worker)
        return torch.full((number,), torch.nan)


class WorkerDiedError(Exception):
    """A worker process ended unexpectedly; the message says how."""


class Worker:
    """One worker process, started on demand."""

    def __init__(self, packed: bytes, timeout: float, threads: int) -> None:
        self.packed, self.timeout, self.threads = packed, timeout, threads
        self.process: Any = None
        self.pipe: Connection | None = None
        self.closed = False
        self._starting = threading.Lock()

    def ask(self, what: str, arguments: tuple[Any, ...]) -> Any:
        """Call the reward in the process. Raises what the reward raises, or WorkerDiedError."""
        late = threading.Event()
        try:
            process, pipe = self._running()
            # Killing the process closes its end of the pipe, which ends any blocking send or recv.
            timer = threading.Timer(self.timeout, lambda: (late.set(), process.kill()))
            timer.daemon = True
            timer.start()
            try:
                pipe.send((what, arguments))
                failed, answer = pipe.recv()
            finally:
                timer.cancel()
        except (EOFError, OSError) as error:
            how = f"took more than {self.timeout:g} s" if late.is_set() else f"died ({self.end()})"
            self.end()
            raise WorkerDiedError(how) from error
        if failed:
            raise answer
        return answer

    def _running(self) -> tuple[Any, Connection]:
        with self._starting:
            if self.closed:
                raise WorkerDiedError("has been closed")
            if self.process is None or self.pipe is None or not self.process.is_alive():
                self.process, self.pipe = self._start()
            return self.process, self.pipe

    def _start(self) -> tuple[Any, Connection]:
        # Workers are forked from a server without threads or accelerators that has already imported torch.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.packed, self.threads), daemon=True)
        process.start()
        theirs.close()  # otherwise the pipe would stay open when the process dies
        return process, pipe

    def end(self, forever: bool = False) -> str:
        """Kill the process if it still runs, and describe how it ended. forever: allow no new one."""
        if forever:
            with self._starting:  # a process that another thread is starting would outlive Ctrl-C
                self.closed = True
        if self.process is None:
            return "it did not start"
        self.process.join(0 if forever else 1)  # a dying process gets a second to report its own exit code
        self.process.kill()
        self.process.join()
        return _describe_exit(self.process.exitcode)


def _end_all(workers: list[Worker]) -> None:
    for worker in workers:
        worker.end(forever=True)


def _describe_exit(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "killed, often for lack of memory"
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


# ------------------------------------------------------------ in the process


def _serve(pipe: Connection, packed: bytes, threads: int) -> None:
    """Main loop of a worker: answer until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent handles it
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    reward: Any = None
    while True:
        try:
            what, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            reward = _load(packed) if reward is None else reward
            answer = False, _call(reward, what, arguments)
        except Exception as error:
            answer = True, _picklable(error)
        pipe.send(answer)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # even if a reward never returns


def _load(packed: bytes) -> Any:
    reward = pickle.loads(packed)
    return reward() if isinstance(reward, partial) and isinstance(reward.func, type) else reward


@torch.no_grad()
def _call(reward: Any, what: str, arguments: tuple[Any, ...]) -> Any:
    if what == "self_check":
        return getattr(reward, "self_check", lambda: None)()
    media, prompts, metadata, compared = arguments
    compared = {name: torch.from_numpy(numbers) for name, numbers in compared.items()}
    scores = reward(torch.from_numpy(media), prompts, metadata, **compared)
    return torch.as_tensor(scores, dtype=torch.float32).numpy()


def _picklable(error: Exception) -> Exception:
    """The error itself if it can be pickled, otherwise a RuntimeError with its message.

    Unless it is a RewardError, which explains itself, the traceback of this process is added as a note.
    """
    if not isinstance(error, RewardError):
        error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}").with_traceback(None)
    return error
