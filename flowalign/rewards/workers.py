"""A reward in processes of its own: for what is slow on the CPU, holds the interpreter, or may die."""

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
    """A reward of media whose batches are divided among processes.

    A chunk whose process dies, or takes longer than `timeout`, is given to a new one, once; then its scores are NaN.
    The reward has to be picklable. Given as a class and its arguments (`_partial_: true`), it is made in the processes
    and nowhere else.
    """

    def __init__(
        self,
        reward: Reward | Callable[..., Reward],
        workers: int = 2,
        chunk: int = 8,
        timeout: float = 600.0,
        threads: int = 1,
    ) -> None:
        """chunk: samples that a process scores at a time, groupwise rewards all of them; timeout: seconds for these,
        the start of the process included; threads: of torch in a process."""
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
        """See `Reward`; media travel as float32."""
        size = len(prompts) if self.groupwise else self.chunk
        rows = [slice(i, i + size) for i in range(0, len(prompts), size)]
        pixels, also = media.detach().float().cpu(), {name: t.cpu().numpy() for name, t in compared.items()}
        chunks = [("score", (pixels[r].numpy(), prompts[r], metadata[r], also)) for r in rows]
        try:
            return torch.cat([torch.as_tensor(part) for part in self._pool.map(self._score_chunk, chunks)])
        except (KeyboardInterrupt, SystemExit):
            self.close()  # the interpreter waits for its threads, and these for the processes
            raise

    def self_check(self) -> None:
        """That of the reward, in a process, which also shows that one can be started; RewardError with the reason."""
        with_one = self._idle.get()
        try:
            with_one.ask("self_check", ())
        except WorkerDiedError as error:
            raise RewardError(f"its worker {error}.") from error
        finally:
            self._idle.put(with_one)

    def close(self) -> None:
        """Ends the processes."""
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
    """How a process ended that should not have."""


class Worker:
    """One process, started when it is asked something and there is none."""

    def __init__(self, packed: bytes, timeout: float, threads: int) -> None:
        self.packed, self.timeout, self.threads = packed, timeout, threads
        self.process: Any = None
        self.pipe: Connection | None = None
        self.closed = False

    def ask(self, what: str, arguments: tuple[Any, ...]) -> Any:
        """The answer; what the reward raises, or WorkerDiedError."""
        if self.closed:
            raise WorkerDiedError("has been closed")
        late = threading.Event()
        try:
            process, pipe = self._running()
            # A dead process closes its end of the pipe, so killing it is the one way out of every wait.
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
        if self.process is None or self.pipe is None or not self.process.is_alive():
            # Forked from a process without threads and accelerators, which has imported torch once for all of them.
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__])
            self.pipe, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, self.packed, self.threads), daemon=True)
            process.start()
            theirs.close()  # else its end would outlive it
            self.process = process
        return self.process, self.pipe

    def end(self, forever: bool = False) -> str:
        """Leaves no process behind; says how it went."""
        self.closed = self.closed or forever
        if self.process is None:
            return "it did not start"
        self.process.join(0 if forever else 1)  # of a dead one, its own last words
        self.process.kill()
        self.process.join()
        return _describe_exit(self.process.exitcode)


def _end_all(workers: list[Worker]) -> None:
    for worker in workers:
        worker.end(forever=True)


def _describe_exit(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "killed, often for want of memory"
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


# ------------------------------------------------------------ in the process


def _serve(pipe: Connection, packed: bytes, threads: int) -> None:
    """Answers until the other end is closed, or its process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides what it means
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
        os._exit(1)  # also out of a reward that never returns


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
    """As it is if it can travel, with the trace of this process as a note where it gives no reason of its own."""
    if not isinstance(error, RewardError):
        error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}").with_traceback(None)
    return error
