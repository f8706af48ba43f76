"""Drains a service of this machine before it stops: replicas refuse new calls, and running calls may end."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.haproxy import await_replies_sent
from service.local_ray import core_is_running

_POLL_S = 0.1
_ANSWER_S = 1.0


def drain(directory: Path, drain_s: float, stop_now: Callable[[], bool]) -> None:
    """Makes all replicas refuse new calls, and waits until running calls have ended and clients have the replies.

    Health turns to NOT_SERVING at once. Waits at most `drain_s` seconds, and no longer once `stop_now` is true or Ray's
    core has ended.

    Args:
        directory: the folder of the run.
    """
    deadline = time.monotonic() + drain_s
    drained = threading.Event()
    # In a thread, because calls of Ray can block for longer than that.
    threading.Thread(target=_drain, args=(directory, drained), name="drain", daemon=True).start()
    while not drained.wait(_POLL_S) and not stop_now() and time.monotonic() < deadline and core_is_running():
        pass


def _drain(directory: Path, drained: threading.Event) -> None:
    from service.app import drain_replica

    with contextlib.suppress(Exception):  # Ray has failed or has been stopped meanwhile
        _await_actors("SERVE_REPLICA::", drain_replica)
        _await_actors("SERVE_PROXY_ACTOR", _forwarded_all)
        await_replies_sent(directory, math.inf)
    drained.set()


def _await_actors(prefix: str, question: Callable[[Any], bool]) -> None:
    """Asks Serve's actors of a kind until all have said yes or are gone.

    Actors that come meanwhile are asked too, but not waited for: a replica that replaces a dead one must take no calls.

    Args:
        question: runs in the actor's process and gets the actor.
    """
    import ray

    names = _serve_actors(prefix)
    awaited = set(names)
    while True:
        answers: dict[str, Any] = {}
        for name in names:
            with contextlib.suppress(ValueError):  # gone
                answers[name] = ray.get_actor(name, "serve").__ray_call__.remote(question)
        awaited = {name for name in awaited & answers.keys() if not _yes(answers[name])}
        if not awaited:
            return
        time.sleep(_POLL_S)
        names = _serve_actors(prefix)


def _serve_actors(prefix: str) -> list[str]:
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == "serve" and actor["name"].startswith(prefix)]


def _yes(answer: Any) -> bool:
    """Whether an actor has said yes or cannot run calls any more."""
    import ray

    try:
        return bool(ray.get(answer, timeout=_ANSWER_S))
    except ray.exceptions.GetTimeoutError:
        return False
    except Exception:
        return True


# Whether Serve's own proxy has passed all replies on; HAProxy's manager has no `grpc_proxy`. A lambda travels as code.
# For a function, the proxy would import this module, which takes seconds.
_forwarded_all = lambda proxy: not getattr(getattr(proxy, "grpc_proxy", None), "_ongoing_requests", 0)  # noqa: E731
