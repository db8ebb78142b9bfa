"""Into a private run come those, and only those, to whom its organiser has issued a token."""

import asyncio
import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from hivemind.averaging.allreduce import AveragingMode
from hivemind.compression import NoCompression
from hivemind.dht.protocol import DHTProtocol
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P, P2PHandlerError, PeerID, ServicerBase
from hivemind.proto import averaging_pb2, dht_pb2
from hivemind.proto.runtime_pb2 import Tensor
from hivemind.utils import MSGPackSerializer, get_dht_time
from hivemind.utils.asyncio import as_aiter
from hivemind.utils.auth import AuthRole
from hivemind.utils.crypto import RSAPrivateKey

from arguments import PeerArguments
from src.access import gate, keys, organiser
from src.access.gate import GatedStub, MemberGate
from src.access.keys import create_key, load_key, public_key_of
from src.access.membership import Membership, MembershipKeeper, load_identity
from src.access.ownership import peer_id_of
from src.access.tokens import sign_revocations, sign_token, write_token_file
from src.preflight.machine import Workload
from src.preflight.run import run_checks
from src.swarm.averagers import LeanGradientAverager, LeanStateAverager
from src.swarm.dht import TrainerMetrics, find_reach, start_dht, visible_addresses
from src.swarm.probe import ConnectionProbe, ask_to_knock, measure_speed
from tests.reference.fake_swarm import tiny_model

RUN, LOOPBACK, HOUR = "private", "/ip4/127.0.0.1/tcp/0", 3600.0


@pytest.fixture(scope="module")
def office(tmp_path_factory):
    """The organiser's directory with tokens and keys of three members."""
    directory = tmp_path_factory.mktemp("access")
    assert organiser.main(["--directory", str(directory), "init", RUN]) == 0
    for name in ("anna", "boris", "vera"):
        assert organiser.main(["--directory", str(directory), "issue", RUN, name]) == 0
    return directory / RUN


def membership_of(office, name: str) -> Membership:
    return Membership(office / f"{name}.token", load_key(office / f"{name}.key"), RUN)


def issue(folder, *, organiser=None, run_id=RUN, expires=HOUR, key=None, trusted=None) -> tuple:
    """A key and a token file of any kind: by another organiser, expired, for another key ..."""
    organiser, own = organiser or RSAPrivateKey(), RSAPrivateKey()
    public_key = public_key_of(key or own)
    token = sign_token(organiser, run_id=run_id, name="someone", public_key=public_key, expires=time.time() + expires)
    path = folder / "someone.token"
    write_token_file(path, token, (trusted or organiser).get_public_key())
    return path, own


# -- tokens -----------------------------------------------------------------------------------------------------------


def test_peer_id_is_the_one_that_libp2p_derives_from_the_key(tmp_path):
    key = create_key(tmp_path / "some.key")
    assert peer_id_of(public_key_of(key)) == PeerID.from_identity((tmp_path / "some.key").read_bytes())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"expires": -1.0}, "the token has expired"),
        ({"run_id": "another"}, "the token is for the run another"),
        ({"trusted": RSAPrivateKey()}, "the token is not signed by the run's organiser"),
        ({"key": RSAPrivateKey()}, "the token is for another key than --identity_path"),
    ],
    ids=["expired", "of another run", "forged", "for another key"],
)
def test_bad_token_is_refused_at_the_start_with_the_reason(tmp_path, changes, problem):
    path, key = issue(tmp_path, **changes)
    with pytest.raises(ValueError, match=problem) as caught:
        Membership(path, key, RUN)
    assert str(caught.value).startswith(f"--authorize {path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{}", b"\x80\x04K\x00.", b'{"token": "AAAA", "organiser": "ssh-rsa"}'])
def test_damaged_token_file_is_one_line(tmp_path, content):
    path = tmp_path / "some.token"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a token file, or damaged"):
        Membership(path, RSAPrivateKey(), RUN)


def test_changing_any_field_of_a_token_invalidates_it(office):
    membership = membership_of(office, "anna")
    assert membership.objection(membership.token) == ""
    for field, value in (("username", f"{RUN}/eve"), ("expiration_time", "9e9"),
                         ("public_key", public_key_of(RSAPrivateKey()))):  # fmt: skip
        token = type(membership.token)()
        token.CopyFrom(membership.token)
        setattr(token, field, value)
        assert membership.objection(token) == "is not signed by the run's organiser", field


def test_revocations_are_believed_only_if_signed_for_this_run_and_newer(office):
    organiser, membership = load_key(office / "organiser.key"), membership_of(office, "anna")
    boris = membership_of(office, "boris").token
    fingerprints = [keys.fingerprint(boris.public_key)]

    def learn(key=organiser, run_id=RUN, serial=5, revoked=fingerprints) -> str:
        membership.learn_revocations(sign_revocations(key, run_id=run_id, serial=serial, fingerprints=revoked))
        return membership.objection(boris)

    assert learn(key=RSAPrivateKey()) == "" and learn(run_id="another") == ""
    assert learn() == "was revoked"
    assert learn(serial=4, revoked=[]) == "was revoked", "an older list"
    assert membership.is_revoked(b"[owner:" + boris.public_key + b"]")
    assert learn(serial=6, revoked=[]) == ""
    assert not membership.is_revoked(b"[owner:" + boris.public_key + b"]")


def test_token_in_the_file_is_renewed_while_the_peer_runs(office, tmp_path):
    organiser, key = load_key(office / "organiser.key"), RSAPrivateKey()
    path = tmp_path / "olga.token"

    def write(expires: float):
        token = sign_token(organiser, run_id=RUN, name="olga", public_key=public_key_of(key), expires=expires)
        write_token_file(path, token, organiser.get_public_key())

    write(time.time() + 60)
    membership = Membership(path, key, RUN)
    write(time.time() + 9000)
    membership.renew_token()
    assert float(membership.token.expiration_time) > time.time() + 8000
    path.write_text("damaged", encoding="utf-8")
    membership.renew_token()
    assert membership.objection(membership.token) == ""


def test_member_records_of_bad_peers_are_ignored(office):
    membership = membership_of(office, "anna")
    boris = membership_of(office, "boris")
    forged = sign_token(RSAPrivateKey(), run_id=RUN, name="eve", public_key=public_key_of(RSAPrivateKey()), expires=9e9)
    records = {
        b"[owner:" + boris.token.public_key + b"]": boris.record(),
        b"[owner:" + public_key_of(RSAPrivateKey()) + b"]": membership_of(office, "vera").record(),  # not its own
        b"2": [forged.SerializeToString(), b""],
        b"3": [b"\x00", b"\n"],
        b"4": None,
        b"5": [forged.SerializeToString(), b"AAAA\n[1, 2]"],
    }
    entries = {owner: SimpleNamespace(value=value) for owner, value in records.items()}
    assert list(membership.read_records(entries)) == [peer_id_of(boris.token.public_key)]
    assert membership.read_records([1, 2]) == {}


def test_same_token_written_in_many_ways_takes_no_memory(office):
    membership = membership_of(office, "anna")
    known, serialized = len(membership._verified), membership.token.SerializeToString()
    for number in range(100):
        token = type(membership.token)()
        token.ParseFromString(serialized + b"\xd2\x3e\x04%04d" % number)  # a field that nobody has heard of
        token.signature += b" " * number
        assert membership.objection(token) == ""
    assert len(membership._verified) == known == 1


# -- the organiser's tool ---------------------------------------------------------------------------------------------


def run_access(capsys, *arguments) -> tuple[int, str]:
    code = organiser.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_volunteer_gets_in_with_three_commands(tmp_path, capsys):
    directory = ("--directory", tmp_path / "access")
    assert run_access(capsys, *directory, "init", RUN)[0] == 0
    code, public_key = run_access(capsys, "key", tmp_path / "ivan.key")
    assert code == 0 and public_key.startswith("ssh-rsa ")
    code, said = run_access(capsys, *directory, "issue", RUN, "ivan", public_key.strip() + " ivan@home", "--days", 2)
    assert code == 0 and "use: --authorize" in said
    token = tmp_path / "access" / RUN / "ivan.token"
    token.rename(tmp_path / "ivan.token")  # as it arrives by mail, beside the key
    peer = PeerArguments(run_id=RUN, authorize=str(tmp_path / "ivan.token"))
    membership = load_identity(peer).membership
    assert membership.token.username == f"{RUN}/ivan"
    assert 1.9 < (float(membership.token.expiration_time) - time.time()) / organiser.DAY < 2.1


def test_access_lists_and_revokes(office, tmp_path, capsys):
    directory = ("--directory", tmp_path)
    run_access(capsys, *directory, "init", RUN)
    for name in ("anna", "boris"):
        run_access(capsys, *directory, "issue", RUN, name)
    code, said = run_access(capsys, *directory, "revoke", RUN, "boris")
    assert code == 0 and "1 keys shut out" in said
    states = {line.split()[0]: line.split()[1] for line in run_access(capsys, *directory, "list", RUN)[1].splitlines()}
    assert states == {"name": "state", "anna": "valid", "boris": "revoked"}
    run_access(capsys, *directory, "revoke", RUN, "anna")
    with pytest.raises(ValueError, match="was revoked"):
        Membership(tmp_path / RUN / "boris.token", load_key(tmp_path / RUN / "boris.key"), RUN)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["issue", "unknown", "ivan"], "begin with: init unknown"),
        (["issue", RUN, "../ivan"], "names a file"),
        (["issue", RUN, "ivan", "ssh-rsa AAAA"], "is not a complete RSA public key"),
        (["issue", RUN, "ivan", "nothing"], "neither a public key"),
        *(
            (["issue", RUN, "ivan", f"--days={days}"], f"--days {float(days):g} must be a number from 0.001")
            for days in ("0", "-1", "nan", "inf", "-inf", "1e12", "1e308", "1e-9")
        ),
        (["issue", RUN, "organiser"], "is that of the organiser's own key"),
        (["issue", RUN, "i" * 300], "is too long for a file"),
        (["issue", RUN, "iv\nan"], "names a file"),
        *(
            ([command, run_id, *more], "may hold letters, digits, - and _ only")
            for run_id in ("../e", "a/b", "/e", "..", ".", "", "a\0b", "a\nb", "a b")
            for command, more in (("init", []), ("list", []), ("issue", ["ivan"]), ("revoke", ["ivan"]))
        ),
        (["revoke", RUN, "ivan"], "no token was issued to ivan; there are: anna, boris, vera"),
        (["init", RUN], "exists; a key is never overwritten"),
    ],
)
def test_access_refuses_in_one_line(office, capsys, arguments, problem):
    code, said = run_access(capsys, "--directory", office.parent, *arguments)
    assert code == 2 and problem in said and said.count("\n") == 1


def test_refused_token_leaves_no_trace(office, capsys):
    before = {path: path.read_bytes() for path in office.parent.rglob("*") if path.is_file()}
    for arguments in (["ivan", "--days", "inf"], ["organiser"], ["i" * 300]):
        assert run_access(capsys, "--directory", office.parent, "issue", RUN, *arguments)[0] == 2
    assert {path: path.read_bytes() for path in office.parent.rglob("*") if path.is_file()} == before


TORN = ['{"name": "t', "[1, 2]", "null", '{"name": 1, "fingerprint": "f", "expires": 1}', "[" * 100_000, "1" * 5000,
        '{"name": "t", "fingerprint": "f", "expires": "nan"}', "\x00\x00", "текст"]  # fmt: skip


@pytest.mark.parametrize("line", TORN, ids=range(len(TORN)))
@pytest.mark.parametrize("place", ["first", "last"])
def test_ledger_with_a_damaged_line_still_lists_issues_and_revokes(office, tmp_path, capsys, line, place):
    folder = tmp_path / RUN
    shutil.copytree(office, folder)
    ledger = folder / "issued.jsonl"
    ledger.write_text(f"\ufeff{line}\n{ledger.read_text()}" if place == "first" else ledger.read_text() + line)
    directory = ("--directory", tmp_path)
    code, said = run_access(capsys, *directory, "list", RUN)
    number = 1 if place == "first" else 4
    assert code == 0 and f"issued.jsonl:{number} is damaged and left out" in said and said.count("left out") == 1
    assert run_access(capsys, *directory, "issue", RUN, "gleb")[0] == 0
    code, said = run_access(capsys, *directory, "revoke", RUN, "anna", "gleb")
    assert code == 0 and "2 keys shut out" in said
    states = [line.split()[:2] for line in run_access(capsys, *directory, "list", RUN)[1].splitlines()]
    assert ["anna", "revoked"] in states and ["gleb", "revoked"] in states and ["boris", "valid"] in states


def test_ledger_entry_that_never_ends_is_listed(office, tmp_path, capsys):
    """What `issue --days inf` once wrote."""
    shutil.copytree(office, tmp_path / RUN)
    with (tmp_path / RUN / "issued.jsonl").open("a") as ledger:
        ledger.write('{"name": "eve", "fingerprint": "f", "issued": 1.0, "expires": Infinity}\n')
    code, said = run_access(capsys, "--directory", tmp_path, "list", RUN)
    assert code == 0 and "eve" in said and "9999-" in said


def test_member_whose_line_was_lost_is_revoked_by_the_token_file(office, tmp_path, capsys):
    shutil.copytree(office, tmp_path / RUN)
    (tmp_path / RUN / "issued.jsonl").write_text("")
    code, said = run_access(capsys, "--directory", tmp_path, "revoke", RUN, "boris")
    assert code == 0 and "1 keys shut out" in said
    with pytest.raises(ValueError, match="was revoked"):
        Membership(tmp_path / RUN / "boris.token", load_key(office / "boris.key"), RUN)


def test_damaged_list_of_revocations_is_one_line(office, tmp_path, capsys):
    shutil.copytree(office, tmp_path / RUN)
    for content in (b"", b"AAAA\n[1, 2]", b"AAAA\nnull", b"AAAA\n" + b"[" * 100_000, b"A\n[1, 2, null, 3]"):
        (tmp_path / RUN / "revoked.txt").write_bytes(content)
        for command in (["list", RUN], ["revoke", RUN, "anna"]):
            code, said = run_access(capsys, "--directory", tmp_path, *command)
            assert code == 2 and "revoked.txt is damaged" in said and said.count("\n") == 1


def test_key_files_are_read_by_their_owner_only(office):
    for name in ("organiser.key", "anna.key"):
        assert (office / name).stat().st_mode & 0o777 == 0o400


# -- one identity, one process ----------------------------------------------------------------------------------------


def hold_identity(path, ready, done):
    load_identity(PeerArguments(run_id=RUN, identity_path=str(path)))
    ready.set()
    done.wait(30)


def test_second_process_with_the_same_identity_is_refused(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()
    path = tmp_path / "new" / "peer.key"
    holder = context.Process(target=hold_identity, args=(path, ready, done))
    holder.start()
    try:
        assert ready.wait(30)
        with pytest.raises(ValueError, match="a running peer on this machine has this identity"):
            load_identity(PeerArguments(run_id=RUN, identity_path=str(path)))
    finally:
        done.set()
        holder.join(30)
    load_identity(PeerArguments(run_id=RUN, identity_path=str(path)))


def test_token_without_its_key_is_refused(office, tmp_path):
    token = tmp_path / "anna.token"
    token.write_bytes((office / "anna.token").read_bytes())
    with pytest.raises(ValueError, match=r"anna\.key does not exist; it must be the key that the token was issued for"):
        load_identity(PeerArguments(run_id=RUN, authorize=str(token)))


def test_identity_that_is_no_key_is_refused(tmp_path):
    (tmp_path / "peer.key").write_bytes(b"text")
    with pytest.raises(ValueError, match="is no private key"):
        load_identity(PeerArguments(run_id=RUN, identity_path=str(tmp_path / "peer.key")))


def gate_of_strangers(look_up) -> MemberGate:
    """A gate with one member, ``b"member"``; what is looked up names no other."""
    membership = SimpleNamespace(members_key="members", objection=lambda token: "", read_records=lambda value: {})
    gate = MemberGate(membership, look_up, lambda peer, objection: None)
    gate.tokens[b"member"] = "token"
    return gate


def test_gate_remembers_a_bounded_number_of_strangers(monkeypatch):
    monkeypatch.setattr(gate, "LOOK_UP_SECONDS", -1.0)
    monkeypatch.setattr(gate, "MAX_REMEMBERED", 50)

    async def look_up(key):
        return None

    async def scenario():
        gate = gate_of_strangers(look_up)
        for number in range(200):
            assert await gate.objection(b"%d" % number) == "has shown no valid token"
        assert len(gate._refused) <= 50

    asyncio.run(scenario())


# -- a private run on loopback ----------------------------------------------------------------------------------------


class Member:
    """A member's node and its two averagers, over a vector of ones times ``value``."""

    def __init__(self, office, name: str, value: float, initial_peers=()):
        token = str(office / f"{name}.token")
        self.peer = PeerArguments(run_id=RUN, authorize=token, host_maddrs=[LOOPBACK], initial_peers=[*initial_peers])
        self.identity = load_identity(self.peer)
        self.membership = self.identity.membership
        self.dht, self.owner = start_dht(self.peer, self.identity)
        self.parameter = torch.nn.Parameter(torch.full((3000,), value))
        self.parameter.grad, self.value = torch.full((3000,), value), value
        options = {"dht": self.dht, "membership": self.membership, "start": True, "compression": NoCompression(),
                   "min_matchmaking_time": 2.0, "request_timeout": 1.0, "allreduce_timeout": 20.0,
                   "next_chunk_timeout": 10.0, "min_vector_size": 1000}  # fmt: skip
        self.state = LeanStateAverager(
            params=[{"params": [self.parameter]}],
            optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
            initialize_optimizer=False,
            prefix=f"{RUN}_state_averager",
            **options,
        )
        self.gradients = LeanGradientAverager(
            [self.parameter], reuse_grad_buffers=True, prefix=f"{RUN}_grad_averager", **options
        )
        self.addresses = visible_addresses(self.dht)

    def shutdown(self):
        for part in (self.gradients, self.state, self.dht):
            part.shutdown()


@pytest.fixture(scope="module")
def members(office):
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setattr(gate, "REFRESH_SECONDS", 0.5)
        anna = Member(office, "anna", 1.0)
        stack.callback(anna.shutdown)
        boris = Member(office, "boris", 1.2, anna.addresses)
        stack.callback(boris.shutdown)
        yield anna, boris


async def connection_of(member: Member):
    """A member's own connection to the network; a new one, because one belongs to the event loop that has made it."""
    member.dht._p2p_replica = None
    return await member.dht.replicate_p2p()


async def attempt(call, *, seconds: float = 40.0):
    """A call's answer (a list where it streams), or the kind of its failure."""
    try:
        answer = await asyncio.wait_for(call, seconds)
        if hasattr(answer, "__aiter__"):
            return await asyncio.wait_for(collect(answer), seconds)
        return answer
    except Exception as error:
        return f"{type(error).__name__}: {error}"


async def collect(stream):
    """All messages; the other side may hang up after its refusal, while this one is still sending."""
    messages = []
    try:
        async for message in stream:
            messages.append(message)
    except OSError:
        if not messages:
            raise
    return messages


async def call_averagers(p2p, target: PeerID) -> dict:
    """What each handler of both averagers answers."""
    answers = {}
    for averager_type, prefix in ((LeanStateAverager, "state"), (LeanGradientAverager, "grad")):
        stub = averager_type.get_stub(p2p, target, namespace=f"{RUN}_{prefix}_averager")
        join = averaging_pb2.JoinRequest(
            schema_hash=b"x",
            expiration=get_dht_time() + 5,
            group_key="x",
            gather=MSGPackSerializer.dumps([None, AveragingMode.NODE.value, MSGPackSerializer.dumps(0)]),
        )
        part = averaging_pb2.AveragingData(code=averaging_pb2.PART_FOR_AVERAGING, group_id=b"x")
        answers[prefix, "join"] = await attempt(stub.rpc_join_group(join))
        answers[prefix, "part"] = await attempt(stub.rpc_aggregate_part(as_aiter(part)))
        answers[prefix, "state"] = await attempt(stub.rpc_download_state(averaging_pb2.DownloadRequest()))
    beginning = averaging_pb2.AveragingData(group_id=MSGPackSerializer.dumps([0, 0]))
    stub = LeanStateAverager.get_stub(p2p, target, namespace=f"{RUN}_state_averager")
    answers["state", "resume"] = await attempt(stub.rpc_resume_state(beginning))
    return answers


async def call_dht(p2p, target: PeerID, authorizer=None) -> dict:
    """What each handler of the DHT answers; without an authorizer as plain hivemind would ask."""
    stub = ServicerBase.get_stub.__func__(DHTProtocol, p2p, target)
    node = dht_pb2.NodeInfo(node_id=DHTID.generate().to_bytes())
    keys = [DHTID.generate(f"{RUN}_{name}").to_bytes() for name in ("members", "progress", "metrics")]
    requests = {
        "ping": dht_pb2.PingRequest(peer=node),
        "find": dht_pb2.FindRequest(keys=keys, peer=node),
        "store": dht_pb2.StoreRequest(
            keys=keys[:1], subkeys=[b"\xc0"], values=[b"\x01"], expiration_time=[get_dht_time() + 99], in_cache=[False],
            peer=node,
        ),
    }  # fmt: skip
    for request in requests.values():
        if authorizer is not None:
            await authorizer.sign_request(request, None)
    return {
        name: await attempt(getattr(stub, f"rpc_{name}")(request), seconds=15) for name, request in requests.items()
    }


async def call_probe(p2p, target: PeerID) -> dict:
    """What each handler of the connection probe answers."""
    stub = ConnectionProbe.get_stub(p2p, target)
    return {
        ("probe", "send"): await attempt(stub.rpc_send(Tensor())),
        ("probe", "receive"): await attempt(stub.rpc_receive(as_aiter(Tensor(buffer=b"12345")))),
        ("probe", "knock"): await attempt(stub.rpc_knock(Tensor(buffer=json.dumps([1]).encode()))),
    }


PROBE_REFUSALS = {"send": [], "receive": Tensor(buffer=b"0"), "knock": Tensor(buffer=b"[]")}


def assert_refused(answers: dict) -> None:
    for name, answer in answers.items():
        if name[-1] in ("join", "part"):
            assert not isinstance(answer, str), (name, answer)
            assert [message.code for message in answer] == [averaging_pb2.PROTOCOL_VIOLATION], (name, answer)
        elif name[-1] in ("state", "resume"):
            assert answer == [], (name, "the state was handed out")
        elif name[0] == "probe":
            # a handler that does not read on hangs up on a caller that still sends, and its answer may be lost
            hung_up = name[1] == "receive" and isinstance(answer, str)
            assert hung_up or answer == PROBE_REFUSALS[name[1]], (name, answer)
        else:
            assert isinstance(answer, str) and answer.startswith("P2PHandlerError"), (name, answer)


def token_authorizer(office, kind: str):
    """What a stranger of some kind would sign its requests with."""
    key = RSAPrivateKey()
    organiser = load_key(office / "organiser.key")
    signer = RSAPrivateKey() if kind == "forged" else organiser
    expires = time.time() + (-5 if kind == "expired" else HOUR)
    token = sign_token(signer, run_id=RUN, name="eve", public_key=public_key_of(key), expires=expires)
    if kind == "stolen":
        token = membership_of(office, "vera").token
    membership = SimpleNamespace(private_key=key, token=token, objection=lambda token: "")
    return gate.MemberAuthorizer(membership)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["stranger", "forged", "expired", "stolen", "relayed"])
def test_who_has_no_valid_token_gets_nothing_from_any_handler(members, office, kind, tmp_path):
    anna, boris = members

    async def scenario():
        p2p = await P2P.create(initial_peers=anna.addresses[:1], identity_path=str(tmp_path / "stranger.key"))
        try:
            if kind == "relayed":  # what a member has signed, as it comes to whomever it asks
                authorizer = gate.MemberAuthorizer(boris.membership)
            else:
                authorizer = None if kind == "stranger" else token_authorizer(office, kind)
            assert_refused(await call_dht(p2p, anna.dht.peer_id, authorizer))
            if kind == "stranger":  # an averager sees of a caller only who it is
                assert_refused(await call_averagers(p2p, anna.dht.peer_id))
                assert_refused(await call_probe(p2p, anna.dht.peer_id))
            return p2p.peer_id
        finally:
            await p2p.shutdown()

    stranger = asyncio.run(scenario())
    if kind == "stranger":
        refusals = anna.state.take_refusals()
        assert refusals == [(str(stranger), "has shown no valid token")], "said once"


def test_answer_of_a_member_that_somebody_else_passes_on_is_none(members):
    """Nobody stands between two members."""
    anna, boris = members
    signs, asks = gate.MemberAuthorizer(anna.membership), gate.MemberAuthorizer(boris.membership)

    async def passed_on_by(peer: PeerID):
        async def rpc_ping(request):
            response = dht_pb2.PingResponse()
            assert await signs.validate_request(request)
            await signs.sign_response(response, request)
            return response

        stub = SimpleNamespace(_peer=peer, rpc_ping=rpc_ping)
        return await gate.BoundToCaller(stub, AuthRole.CLIENT, asks).rpc_ping(dht_pb2.PingRequest())

    assert asyncio.run(passed_on_by(anna.dht.peer_id)) is not None
    assert asyncio.run(passed_on_by(peer_id_of(public_key_of(RSAPrivateKey())))) is None


@pytest.mark.timeout(240)
def test_members_reach_each_other_and_average(members):
    anna, boris = members

    async def scenario():
        p2p = await connection_of(boris)
        answers = await call_averagers(p2p, anna.dht.peer_id)
        answers.update(await call_dht(p2p, anna.dht.peer_id, gate.MemberAuthorizer(boris.membership)))
        return answers

    answers = asyncio.run(scenario())
    for prefix in ("state", "grad"):
        assert [m.code for m in answers[prefix, "join"]] == [averaging_pb2.NOT_LOOKING_FOR_GROUP]
        assert [m.code for m in answers[prefix, "part"]] == [averaging_pb2.BAD_GROUP_ID]
    assert answers["state", "state"] and answers["state", "resume"], "no state"
    assert answers["ping"].peer.node_id and len(answers["find"].results) == 3
    assert len(answers["store"].store_ok) == 1
    for attempts_left in (2, 1, 0):
        for member in members:
            member.parameter.grad.fill_(member.value)  # an attempt that failed has used them up
            member.gradients.accumulate_grads_(1)
        steps = [member.gradients.step(wait=False, timeout=15) for member in members]
        try:
            assert [len(step.result(40)) for step in steps] == [2, 2]
            break
        except Exception:
            if not attempts_left:
                raise
    for member in members:
        with member.gradients.get_tensors() as (averaged,):
            torch.testing.assert_close(averaged, torch.full((3000,), 1.1))


@pytest.mark.timeout(240)
def test_members_measure_with_each_other_and_with_nobody_else(members, tmp_path):
    anna, boris = members
    assert measure_speed(boris.dht, str(anna.dht.peer_id)).bandwidth > 1
    assert [(one.port, one.error) for one in ask_to_knock(boris.dht, str(anna.dht.peer_id), [1])] == [(1, "refused")]

    async def measure_with_a_stranger():
        p2p = await P2P.create(initial_peers=anna.addresses[:1], identity_path=str(tmp_path / "stranger.key"))
        try:
            await ConnectionProbe(p2p).add_p2p_handlers(p2p)
            return await asyncio.to_thread(measure_speed, anna.dht, str(p2p.peer_id))
        finally:
            await p2p.shutdown()

    assert asyncio.run(measure_with_a_stranger()) is None


def test_members_knock_for_a_member_that_is_about_to_join(members, office):
    anna, _ = members
    peer = PeerArguments(run_id=RUN, authorize=str(office / "vera.token"), host_maddrs=[LOOPBACK],
                         initial_peers=anna.addresses[:1])  # fmt: skip
    identity = load_identity(peer)
    assert [one.host for one in find_reach(peer, identity).reached] == ["127.0.0.1"]
    os.close(identity.lock)


@pytest.mark.timeout(240)
@pytest.mark.fails_to_start
def test_check_of_a_private_run(members, office, tmp_path):
    anna, _ = members

    def check(**arguments) -> tuple[int, str]:
        peer = PeerArguments(run_id=RUN, host_maddrs=[LOOPBACK], initial_peers=anna.addresses[:1], **arguments)
        lines = []
        code = run_checks(peer, output_dir=str(tmp_path), device=torch.device("cpu"), workload=Workload(2**20),
                          build_model=lambda: (tiny_model(), range(300)), make_card=lambda *built: {},
                          read_data=None, say=lines.append)  # fmt: skip
        return code, "\n".join(lines)

    code, output = check(authorize=str(office / "vera.token"))
    assert code == 0, output
    assert "reaches 127.0.0.1 TCP port" in output and "Mbit/s to it" in output and "warning" not in output, output
    code, output = check()
    assert code == 2
    assert "can be reached, but does not answer" in output and "lets this peer in" in output, output


class Directory:
    """Stands for a membership and the DHT: tokens are the names of those who have published one."""

    members_key = "members"

    def __init__(self, *members: str, seconds: float = 0.0):
        self.members, self.seconds, self.num_looks = set(members), seconds, 0

    def objection(self, token: str) -> str:
        return ""

    def read_records(self, value) -> dict:
        return {name: name for name in value}

    async def look_up(self, key: str):
        self.num_looks += 1
        await asyncio.sleep(self.seconds)
        return SimpleNamespace(value=set(self.members))


async def ask(gate: MemberGate, *peers: str) -> dict[str, float]:
    """How many seconds each of these calls took that came at the same time; those of non-members are refused."""

    async def one(peer):
        started = time.monotonic()
        admitted = not await gate.objection(peer)
        assert admitted == (peer in gate.membership.members), peer
        return time.monotonic() - started

    return dict(zip(peers, await asyncio.gather(*map(one, peers)), strict=True))


def gate_to(directory: Directory) -> MemberGate:
    return MemberGate(directory, directory.look_up, lambda *_: None)


STRANGERS = [f"stranger {number}" for number in range(20)]


def test_strangers_look_together_and_no_member_waits_for_their_number(monkeypatch):
    monkeypatch.setattr(gate, "LOOK_UP_SECONDS", 0.3)
    directory = Directory("known")

    async def scenario():
        gate = gate_to(directory)
        await ask(gate, "known")
        directory.members.add("new")
        took = await ask(gate, *STRANGERS, "new", "known")
        assert took["known"] < min(took[stranger] for stranger in STRANGERS), "it waits for none of them"
        assert max(took.values()) < 5.0, "one after the other, they would take 6 s"
        await ask(gate, *STRANGERS)
        return directory.num_looks

    assert asyncio.run(scenario()) <= 3


def test_known_member_is_not_kept_by_a_slow_look(monkeypatch):
    monkeypatch.setattr(gate, "REFRESH_SECONDS", 0.0)
    monkeypatch.setattr(gate, "PATIENCE_SECONDS", 0.2)
    directory = Directory("known")

    async def scenario():
        gate = gate_to(directory)
        await ask(gate, "known")
        directory.seconds = 5.0
        return (await ask(gate, "known"))["known"]

    assert asyncio.run(scenario()) < 1.0


def test_caller_that_hangs_up_does_not_take_the_look_with_it(monkeypatch):
    monkeypatch.setattr(gate, "LOOK_UP_SECONDS", 0.2)
    directory = Directory("new", seconds=0.2)

    async def scenario():
        gate = gate_to(directory)
        impatient = asyncio.create_task(gate.objection("stranger"))
        waiting = asyncio.create_task(ask(gate, "new"))
        await asyncio.sleep(0.1)
        impatient.cancel()
        await waiting

    asyncio.run(scenario())


def test_nobody_but_a_member_is_called():
    async def objection(peer):
        return "" if peer == "member" else "has shown no valid token"

    async def answer(request):
        return request

    def call(peer: str):
        stub = GatedStub(SimpleNamespace(rpc_join_group=answer), peer, SimpleNamespace(objection=objection))
        return asyncio.run(stub.rpc_join_group("hello"))

    assert call("member") == "hello"
    with pytest.raises(P2PHandlerError, match="did not call stranger: it has shown no valid token"):
        call("stranger")


def owned_by(member: Member, found) -> bool:
    return found is not None and not {member.owner, member.dht.peer_id.to_bytes()}.isdisjoint(found.value)


@pytest.mark.timeout(240)
def test_revoked_member_is_shut_out_while_the_run_goes_on(members, office):
    """The last test: Boris stays outside."""
    anna, boris = members
    assert organiser.main(["--directory", str(office.parent), "revoke", RUN, "boris"]) == 0
    keys = (f"{RUN}_metrics", f"{RUN}_state_averager.all_averagers")
    metrics = TrainerMetrics(epoch=1).dict()
    for subkey, (key, value) in zip((boris.owner, boris.dht.peer_id.to_bytes()),
                                    zip(keys, (metrics, 1.0), strict=True), strict=True):  # fmt: skip
        assert boris.dht.store(key, value, get_dht_time() + 600, subkey=subkey)
    assert all(owned_by(boris, anna.dht.get(key, latest=True)) for key in keys)
    assert organiser.main(["--directory", str(office.parent), "revoke", RUN, "boris"]) == 0
    MembershipKeeper(anna.membership, anna.dht, anna.owner).update()
    assert not any(owned_by(boris, anna.dht.get(key, latest=True)) for key in keys), "nor do his records count"
    assert owned_by(boris, anna.dht.get(f"{RUN}_members", latest=True)), "so that all can say why"

    async def scenario():
        p2p = await connection_of(boris)
        give_up_at = time.monotonic() + 20
        refusal = [averaging_pb2.PROTOCOL_VIOLATION]
        while True:  # each averager looks for news on its own
            answers = await call_averagers(p2p, anna.dht.peer_id)
            codes = [[message.code for message in answers[prefix, "join"]] for prefix in ("state", "grad")]
            if codes == [refusal, refusal] and not answers["state", "state"]:
                break
            assert time.monotonic() < give_up_at
            await asyncio.sleep(0.5)
        careless = SimpleNamespace(**vars(boris.membership))  # he himself knows by now, and would ask nobody
        careless.objection = lambda token: ""
        answers.update(await call_dht(p2p, anna.dht.peer_id, gate.MemberAuthorizer(careless)))
        answers.update(await call_probe(p2p, anna.dht.peer_id))
        return answers

    assert_refused(asyncio.run(scenario()))
    assert (str(boris.dht.peer_id), "its token was revoked") in anna.state.take_refusals()
    with pytest.raises(ValueError, match="was revoked"):
        membership_of(office, "boris")
    assert json.loads((office / "anna.token").read_text())["issued_to"] == f"{RUN}/anna"


def test_key_on_a_file_system_without_locks_is_used_with_a_notice(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    path = tmp_path / "key.pem"
    load_identity(PeerArguments(run_id=RUN, identity_path=str(path)))
    assert f"{path} cannot be locked (No locks available)" in caplog.text
