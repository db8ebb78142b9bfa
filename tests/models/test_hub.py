"""What the hub says and does not say: whose token it is, why it refuses, and how long it may be silent."""

import socket
import threading
import time

import huggingface_hub
import pytest
from huggingface_hub import HfApi, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx

from src.models import hub
from src.models.hub import ImpatientClient, SilentHub, check_token, explain_hub_error, give_up_on_silence


@pytest.fixture(autouse=True)
def usual_client(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_dummy")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield
    set_client_factory(huggingface_hub.utils._http.default_client_factory)


class Server:
    """Answers every connection with the pieces it is given, ``pause`` apart; a server without pieces says nothing."""

    def __init__(self, *pieces: bytes, pause: float = 0.0):
        self.pieces, self.pause, self.num_connections = pieces, pause, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.connections = []
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.num_connections += 1
            self.connections.append(connection)
            if self.pieces:
                connection.recv(2**16)
            for piece in self.pieces:
                connection.sendall(piece)
                time.sleep(self.pause)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for connection in self.connections:
            connection.close()


def test_upload_to_a_hub_that_never_answers_is_given_up_at_once_and_named():
    with Server() as server:
        give_up_on_silence(0.2)
        with pytest.raises(SilentHub) as error:
            huggingface_hub.utils.http_backoff("POST", server.url, json={})
        assert explain_hub_error(error.value)[0] == "127.0.0.1 does not answer: nothing moved for 0 s"
        assert server.num_connections == 1, "the library does not try again by itself, in silence"


def test_hub_that_answers_slowly_is_waited_for():
    pieces = [b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\n", *[b"x"] * 6]
    with Server(*pieces, pause=0.2) as server:
        give_up_on_silence(0.8)
        assert huggingface_hub.get_session().post(server.url).text == "xxxxxx"


@pytest.mark.parametrize(("size", "seconds"), [(0, 60.0), (1_250_000, 160.0), (2**25, 60.0 + 2**24 / 12_500)])
def test_answer_is_waited_for_as_long_as_a_slow_line_may_still_be_sending(size, seconds):
    limits = []
    answer = httpx.MockTransport(lambda request: limits.append(request.extensions["timeout"]) or httpx.Response(200))
    with ImpatientClient(60.0, transport=answer) as client:
        client.put("http://hub/", content=bytes(size))
        client.put("http://hub/", content=bytes(size), timeout=3.0)
    assert limits[0] == {"connect": 60.0, "read": pytest.approx(seconds), "write": 60.0, "pool": 60.0}
    assert limits[1]["read"] == 3.0, "what the library has chosen itself"


def api_that_answers(answer):
    class Api:
        def whoami(self):
            if isinstance(answer, Exception):
                raise answer
            return answer

    return Api()


def user(role="write", orgs=(), **access):
    return {"name": "Me", "orgs": list(orgs), "auth": {"accessToken": {"role": role, **access}}}


def scopes(name, *permissions):
    return {"scoped": [{"entity": {"name": name}, "permissions": list(permissions)}]}


@pytest.mark.parametrize(
    "answer",
    [
        user(),
        user(orgs=[{"name": "other"}, {"name": "me"}]),
        user("fineGrained", fineGrained=scopes("me", "repo.content.read", "repo.write")),
        user("fineGrained", fineGrained=scopes("me/x", "repo.write")),
        user("fineGrained"),
        user(None),
        {"name": "me"},
    ],
)
def test_token_that_may_write_is_found(answer):
    assert check_token(api_that_answers(answer), "me/x").lower() == "me"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (user("read"), "the token of Me may not write to me/x"),
        (user("fineGrained", fineGrained=scopes("me", "repo.content.read")), "may not write to me/x"),
        (user("fineGrained", fineGrained=scopes("other", "repo.write")), "may not write to me/x"),
        (user() | {"name": "you"}, "the token is of you, who is no member of me"),
    ],
)
def test_token_that_may_not_write_is_refused(answer, said):
    with pytest.raises(ValueError, match=said) as error:
        check_token(api_that_answers(answer), "me/x")
    assert "HF_TOKEN" in str(error.value)


def answered(status, said=None):
    response = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/api/whoami-v2"))
    return HfHubHTTPError("Invalid user token.", response=response, server_message=said)


@pytest.mark.parametrize(
    ("answer", "kind", "said"),
    [
        (answered(401, "Invalid credentials"), ValueError, "401: Invalid credentials; .*HF_TOKEN"),
        (answered(403, "Blocked"), ValueError, "403: Blocked; .*HF_TOKEN"),
        (answered(500, "Trouble"), ConnectionError, "500: Trouble"),
        (answered(429), ConnectionError, "429: Too Many Requests"),
        (httpx.ConnectError("refused"), ConnectionError, "refused"),
        (ValueError("Expecting value"), ConnectionError, "something else answers in its place"),
        ([], ConnectionError, "something else answers in its place"),
    ],
)
def test_hub_that_cannot_be_asked_is_told_from_one_that_refuses(answer, kind, said):
    with pytest.raises(kind, match=said):
        check_token(api_that_answers(answer), "me/x")


@pytest.mark.parametrize(("token", "said"), [("", "no token"), ("hf_а", "no token has"), ("hf x", "no token has")])
def test_token_that_is_missing_or_none(monkeypatch, tmp_path, token, said):
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ValueError, match=said) as error:
        check_token(HfApi(), "me/x")
    assert "HF_TOKEN" in str(error.value)


def test_question_to_a_hub_that_never_answers_ends():
    with Server() as server:
        give_up_on_silence(0.2)
        with pytest.raises(ConnectionError, match="does not answer"):
            check_token(HfApi(endpoint=server.url), "me/x")


def test_reason_of_the_hub_is_found_behind_the_librarys_own_words_and_is_short():
    try:
        try:
            raise answered(403, "You have no rights " + 1000 * "x")
        except HfHubHTTPError as error:
            raise answered(403) from error
    except HfHubHTTPError as error:
        reason, _ = explain_hub_error(error)
    assert reason.startswith("403: You have no rights") and len(reason) <= hub.MAX_REASON_LENGTH + 10
