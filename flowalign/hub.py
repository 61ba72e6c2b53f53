"""The model hub: repository names, and its errors explained in one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether the name has the form org/name."""
    return HUB_ID.fullmatch(name) is not None


@contextmanager
def explain_hub_errors(
    name: str, error_type: type[Exception], local: bool, *library_errors: type[Exception]
) -> Iterator[None]:
    """Turn errors of the hub, and of libraries that read its files, into `error_type` with one sentence about `name`.

    local: whether `name` is a folder. library_errors: further errors that the library raises for unreadable files.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise error_type(f"{name} is gated: accept its licence on its page and set HF_TOKEN.") from error
    except RepositoryNotFoundError as error:
        raise error_type(f"the hub has no {name} (or it is private and HF_TOKEN is not set).") from error
    except (OSError, *library_errors) as error:  # OSError includes every other error of the hub
        why = "is incomplete or damaged" if local else "is not in the local cache, and the hub did not give it"
        raise error_type(f"{name} {why} ({str(error).strip().splitlines()[0]}).") from error
