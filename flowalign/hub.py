"""What is on the model hub, or in its cache here: names, and refusals in one sentence."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether it has the form org/name."""
    return HUB_ID.fullmatch(name) is not None


@contextmanager
def explained(name: str, refusal: type[Exception], local: bool, *also: type[Exception]) -> Iterator[None]:
    """Inside, what the hub and the libraries that read its files raise of `name` becomes a `refusal`.

    local: whether the name is that of a folder; also: what else the library raises for files that it cannot read.
    """
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        yield
    except GatedRepoError as error:
        raise refusal(f"{name} is gated: accept its licence on its page and set HF_TOKEN.") from error
    except RepositoryNotFoundError as error:
        raise refusal(f"the hub has no {name} (or it is private and HF_TOKEN is not set).") from error
    except (OSError, *also) as error:  # also every other error of the hub
        why = "is incomplete or damaged" if local else "is not in the local cache, and the hub did not give it"
        raise refusal(f"{name} {why} ({str(error).strip().splitlines()[0]}).") from error
