"""A connection to another rank that breaks: an exit code of its own, as this rank was not the first to fail."""

from collections.abc import Iterator
from contextlib import contextmanager

from raptr_ds.errors import LostRankError

# gloo's and the store's words for a closed socket, and NCCL's for a process that is gone (torch has no class for them).
_SIGNS = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "likely closed", "ncclRemoteError")


@contextmanager
def lost_ranks_explained() -> Iterator[None]:
    """Turn an error of a connection that another rank has closed into LostRankError."""
    try:
        yield
    except RuntimeError as error:  # torch.distributed's errors are
        if any(sign in str(error) for sign in _SIGNS):
            reason = str(error).strip().splitlines()[0]
            raise LostRankError(
                "a connection to another rank broke: that rank has ended, or its host cannot be reached. Why it ended "
                f"is in its own output, or in the launcher's ({reason})"
            ) from error
        raise
