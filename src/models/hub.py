"""What the Hugging Face hub holds of a model, and what went wrong on the way there: in one line, with what to do."""

from pathlib import Path

from huggingface_hub import get_session, get_token, set_client_factory, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import httpx

from .checkpoint import INDEX_FILE, WEIGHTS_FILE

STATE_FILE = "state.pth"  # the published model's weights, from before safetensors
LOG_IN = "log in with `hf auth login` or set HF_TOKEN"
LOOK_AT_THE_NETWORK = "look at the network, and at HF_ENDPOINT if it is set"
ADVICE = {
    401: LOG_IN,
    403: "take a token that is allowed to do this (`hf auth login`, HF_TOKEN), or another repository",
    404: "look at the name; a private repository needs a token",
    429: "wait some minutes",
}
MAX_REASON_LENGTH = 300  # of what a server says
SILENCE_SECONDS = 60.0  # an upload is given up when nothing has moved for so long
ASK_SECONDS = 10.0  # the same, for a question at the start
SLOW_UPLINK = 12_500  # bytes a second, 0.1 Mbit/s: slower, and a peer could not take part in averaging either
# What counts as sent although it may still lie here, in the sockets' and the router's buffers.
BUFFERED_BYTES = 2**24


class SilentHub(httpx.TransportError):
    """Nothing has moved for too long. After this huggingface_hub does not try again by itself, as it does after other
    errors: six attempts would last six times as long, without a word."""


class ImpatientClient(httpx.Client):
    """Waits for any part of an answer for ``seconds``, and longer for as long as what was sent may be on its way."""

    def __init__(self, seconds: float, **options):
        super().__init__(timeout=seconds, **options)
        self.seconds = seconds

    def send(self, request, **options):
        size = request.headers.get("Content-Length", "")
        on_its_way = min(int(size), BUFFERED_BYTES) / SLOW_UPLINK if size.isdigit() else 0.0
        if request.extensions.get("timeout", {}).get("read") == self.seconds:  # not one that the caller has chosen
            request.extensions["timeout"] = request.extensions["timeout"] | {"read": self.seconds + on_its_way}
        try:
            return super().send(request, **options)
        except httpx.TimeoutException as error:
            said = f"{request.url.host} does not answer: nothing moved for {self.seconds:.0f} s"
            if request.method in ("GET", "HEAD"):  # for these the library may have a copy from before
                raise httpx.ReadTimeout(said, request=request) from error
            raise SilentHub(said, request=request) from error


def give_up_on_silence(seconds: float = SILENCE_SECONDS) -> None:
    """From now on requests of this process to the hub end when nothing moves for so long. huggingface_hub by itself
    waits for ever. A slow line is not cut off: each piece that is sent or received begins the time anew."""
    present = get_session()
    if isinstance(present, ImpatientClient) and present.seconds == seconds:
        return  # connections may be in use
    options = {"event_hooks": present.event_hooks, "follow_redirects": True}
    set_client_factory(lambda: ImpatientClient(seconds, **options))


def explain_hub_error(error: BaseException) -> tuple[str, str]:
    """(reason, what to do). huggingface_hub wraps errors in others, and begins the text of one with a request id."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    answers = [one for one in chain if isinstance(one, HfHubHTTPError) and one.response is not None]
    for one in answers:
        if one.server_message or one is answers[-1]:
            status = one.response.status_code
            said = one.server_message or one.response.reason_phrase or type(one).__name__
            otherwise = "try again later" if status >= 500 else "look at the name and the token (HF_TOKEN)"
            return f"{status}: {' '.join(str(said).split())[:MAX_REASON_LENGTH]}", ADVICE.get(status, otherwise)
    for one in chain:
        if isinstance(one, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set", "unset it"
        if isinstance(one, LocalTokenNotFoundError):
            return "this machine has no token", LOG_IN
        if isinstance(one, EntryNotFoundError) and not isinstance(one, OSError):
            return first_line(one), "look at the name"
    network = [one for one in chain if isinstance(one, SilentHub) or _is_of_client(one)]
    return first_line((network or chain)[0]), LOOK_AT_THE_NETWORK


def _is_of_client(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0].startswith(("httpx", "httpcore"))


def check_token(api, repo_id: str) -> str:
    """As whom this machine would upload to a repository.

    Raises ValueError, with HF_TOKEN in it, if there is no token or none that may do this, as far as the hub tells;
    ConnectionError with the reason if the hub cannot be asked.
    """
    token = get_token()
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token):
        raise ValueError("HF_TOKEN holds characters that no token has; copy it anew")
    try:
        answer = api.whoami()
        name, namespaces = answer["name"], [answer["name"].lower()]
        namespaces += [organisation["name"].lower() for organisation in answer.get("orgs", [])]
        access = answer.get("auth", {}).get("accessToken", {})
        role = access.get("role")
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        reason, advice = explain_hub_error(error)
        if isinstance(error, HfHubHTTPError) and error.response.status_code not in (401, 403):
            raise ConnectionError(reason) from error
        raise ValueError(f"{reason}; {advice}") from error
    except (httpx.HTTPError, OSError) as error:
        raise ConnectionError(explain_hub_error(error)[0]) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # a hotel's network has a page for everything
        raise ConnectionError("something else answers in its place") from error
    owner = repo_id.partition("/")[0]
    if role == "read" or (role == "fineGrained" and not _may_write(access, repo_id)):
        raise ValueError(f"the token of {name} may not write to {repo_id}; set HF_TOKEN to one that may")
    if role == "write" and owner.lower() not in namespaces:
        raise ValueError(f"the token is of {name}, who is no member of {owner}; set HF_TOKEN to another, or change the "
                         "repository")  # fmt: skip
    return name


def _may_write(access: dict, repo_id: str) -> bool:
    """Whether a fine-grained token names a permission to write to the repository, or to all of its owner."""
    try:
        scopes = access["fineGrained"]["scoped"]
        names = (repo_id.lower(), repo_id.partition("/")[0].lower())
        mine = [scope for scope in scopes if scope["entity"]["name"].lower() in names]
        allowed = [str(word) for scope in mine for word in scope["permissions"]]
    except (KeyError, TypeError, AttributeError):
        return True  # it is not said
    return any(word.startswith("repo.") and word.endswith("write") for word in allowed)


def first_line(error: BaseException) -> str:
    """An error's first line with a meaning, or its name if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and "Request ID" not in line]
    return lines[0] if lines else repr(error)


def download_model(hub_id: str, *, revision: str | None) -> Path:
    """The local copy of a LeanALBERT's configuration and weights: safetensors, else the state.pth it was published as.

    Raises ValueError with what to do if they cannot be fetched.
    """
    give_up_on_silence()
    patterns = ["config.json", WEIGHTS_FILE, INDEX_FILE, "model-*.safetensors"]
    try:
        directory = Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
        if not any((directory / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE)):
            directory = Path(snapshot_download(hub_id, revision=revision, allow_patterns=[*patterns, STATE_FILE]))
    except Exception as error:  # whatever the network or the hub does
        reason, advice = explain_hub_error(error)
        raise ValueError(f"{hub_id}: its weights could not be fetched from the hub ({reason}); {advice}") from error
    return directory
