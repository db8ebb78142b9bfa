"""What the Hugging Face hub holds of a model, and what went wrong on the way there: in one line, with what to do."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from .checkpoint import INDEX_FILE, WEIGHTS_FILE

STATE_FILE = "state.pth"  # the published model's weights, from before safetensors
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
ADVICE = {
    401: LOG_IN,
    403: "take a token that is allowed to do this (`hf auth login`, HF_TOKEN), or another repository",
    404: "look at the name; a private repository needs a token",
    429: "wait some minutes",
}


def explain_hub_error(error: BaseException) -> tuple[str, str]:
    """(reason, what to do). huggingface_hub wraps errors in others, and begins the text of one with a request id."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    for one in chain:
        response = getattr(one, "response", None)
        if isinstance(one, HfHubHTTPError) and response is not None:
            status = response.status_code
            said = one.server_message or getattr(response, "reason_phrase", "") or type(one).__name__
            otherwise = "try again later" if status >= 500 else "look at the name and the token (HF_TOKEN)"
            return f"{status}: {' '.join(str(said).split())}", ADVICE.get(status, otherwise)
    for one in chain:
        if isinstance(one, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set", "unset it"
        if isinstance(one, LocalTokenNotFoundError):
            return "this machine has no token", LOG_IN
        if isinstance(one, EntryNotFoundError) and not isinstance(one, OSError):
            return first_line(one), "look at the name"
    network = [one for one in chain if type(one).__module__.partition(".")[0].startswith(("httpx", "httpcore"))]
    return first_line((network or chain)[0]), "look at the network, and at HF_ENDPOINT if it is set"


def first_line(error: BaseException) -> str:
    """An error's first line with a meaning, or its name if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Request ID" not in line]
    return lines[0] if lines else repr(error)


def download_model(hub_id: str, *, revision: str | None) -> Path:
    """The local copy of a LeanALBERT's configuration and weights: safetensors, else the state.pth it was published as.

    Raises ValueError with what to do if they cannot be fetched.
    """
    patterns = ["config.json", WEIGHTS_FILE, INDEX_FILE, "model-*.safetensors"]
    try:
        directory = Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
        if not any((directory / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
            directory = Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*patterns, STATE_FILE]))
    except Exception as error:  # whatever the network or the hub does
        reason, advice = explain_hub_error(error)
        raise ValueError(f"{hub_id}: its weights could not be fetched from the hub ({reason}); {advice}") from error
    return directory
