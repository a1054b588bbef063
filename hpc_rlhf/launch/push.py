"""Upload a finished model to the hub."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from hpc_rlhf.errors import RUN_FAILED, HpcRlhfError
from hpc_rlhf.launch.prefetch import why_unreachable


def push(files: Mapping[str, Path | bytes], repo: str, public: bool, message: str) -> str:
    """Upload files to a model repository in one commit, and create the repository if there is none.

    Args:
        files: by their names in the repository.
        public: a new repository can be read by everybody.

    Returns:
        The address of the commit.

    Raises:
        HpcRlhfError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if get_token() is None:
        raise HpcRlhfError(
            "there is no token of the hub", where=repo, hint="run hf auth login, or set HF_TOKEN to one that may write"
        )
    if (why := why_unreachable()) is not None:
        raise HpcRlhfError(f"the hub cannot be reached ({why})", where=repo, exit_code=RUN_FAILED)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    api = HfApi(library_name="hpc-rlhf")
    operations = [CommitOperationAdd(name, data) for name, data in files.items()]
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        return str(api.create_commit(repo, operations, commit_message=message).commit_url)
    except HFValidationError as error:
        raise HpcRlhfError(f"is not the name of a repository: {error}", where=repo, hint="give USER/NAME") from error
    except (HfHubHTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise HpcRlhfError(
            f"the hub refuses: {reason}", where=repo, hint="nothing was published; try again", exit_code=RUN_FAILED
        ) from error
