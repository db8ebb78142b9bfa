"""`--check` finds a healthy set-up ready, and names side, address and port of what is wrong with a broken one."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from hivemind.p2p import PeerID
from hivemind.proto.runtime_pb2 import Tensor
from hivemind.utils import get_dht_time
from hivemind.utils.crypto import RSAPrivateKey

from arguments import PeerArguments
from src import LeanAlbertConfig
from src.access.keys import create_key
from src.access.membership import Identity, load_identity
from src.models.memory import predict_memory
from src.preflight import check as check_module
from src.preflight import machine, network
from src.preflight.check import FAILED, OK, WARNING, Check
from src.preflight.machine import Workload
from src.preflight.network import describe_speed, explain_knock
from src.preflight.run import run_checks, settings_for_check, warn_of_vocabulary
from src.settings.folder import folder_of, write_folder
from src.settings.manifest import make_files, make_manifest
from src.swarm.dht import start_dht, visible_addresses
from src.swarm.probe import (
    BYTES_AN_HOUR,
    CHUNK_BYTES,
    ConnectionProbe,
    Knock,
    Ping,
    Speed,
    _ask_epoch,
    _knock_of,
    address_of,
    ask_epoch,
    ask_to_knock,
    measure_bandwidth,
    measure_speed,
    ping,
    reachable,
    tell_epoch,
)
from src.swarm.run_card import RunCard
from tests.reference.fake_swarm import tiny_model
from tests.settings.test_manifest import CONFIG, DEFAULTS, TOKENIZER

REPOSITORY = Path(__file__).resolve().parents[2]
LOOPBACK = "/ip4/127.0.0.1/tcp/0"
CARD = {"--total_steps": "5", "vocabulary": "0123"}
OTHER_ID = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"


def peer_arguments(**kwargs) -> PeerArguments:
    return PeerArguments(**{"run_id": "check", "host_maddrs": [LOOPBACK], **kwargs})


def checked(peer, tmp_path, **kwargs) -> tuple[int, str]:
    """Exit code and output of all checks of a small model."""
    lines = []
    options = {"output_dir": str(tmp_path / "outputs"), "device": torch.device("cpu"),
               "workload": Workload(2**20, batch_size=2, length=64), "make_card": lambda config, tokenizer: CARD,
               "build_model": lambda: (tiny_model(), range(300)), "read_data": lambda tokenizer: None}  # fmt: skip
    code = run_checks(peer, **{**options, **kwargs}, say=lines.append)
    return code, "\n".join(lines)


@pytest.fixture(scope="module")
def running_dht():
    """The node of a peer that is at work."""
    dht, owner = start_dht(peer_arguments(), Identity(RSAPrivateKey()))
    RunCard(dht, "check", owner, CARD).publish()
    yield dht
    dht.shutdown()


@pytest.fixture(scope="module")
def running(running_dht):
    """The address of a peer that is at work."""
    return visible_addresses(running_dht)[0]


def with_port(address: str, port: int) -> str:
    """The same peer at another port of this machine."""
    return f"/ip4/127.0.0.1/tcp/{port}/p2p/{address.rsplit('/', 1)[-1]}"


@pytest.fixture
def other_program():
    """The port of a program that is no peer."""
    with socket.socket() as program:
        program.bind(("127.0.0.1", 0))
        program.listen()
        yield program.getsockname()[1]


@pytest.fixture
def closed_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return port


# -- whole set-ups ----------------------------------------------------------------------------------------------------


def test_check_finds_a_healthy_set_up_ready(running, tmp_path):
    code, output = checked(peer_arguments(initial_peers=[running]), tmp_path)
    assert code == 0, output
    assert FAILED not in output and WARNING not in output, output
    for name in ("open files", "identity", "model and tokenizer", "memory", "shared memory", "disk", "own address",
                 "initial peer", "peer-to-peer daemon: it starts", "round trip", "clock: within",
                 "own port from outside", "bandwidth", "settings of the run: as those", "data"):  # fmt: skip
        assert name in output, name
    port = address_of(running)[1]
    assert f"127.0.0.1 TCP port {port} answers after" in output
    assert output.splitlines()[-1].startswith("READY: 15 checks passed")
    assert not (tmp_path / "outputs").exists(), "a check changes nothing"


@pytest.mark.parametrize(("num_tokens", "is_said"), [(300, False), (270, False), (269, True), (20, True)])
def test_check_says_how_much_of_the_vocabulary_no_token_is_for(num_tokens, is_said):
    said = [check.lines() for check in warn_of_vocabulary(tiny_model(), range(num_tokens))]
    assert len(said) == is_said
    if is_said:
        assert f"room for 300 tokens, the tokenizer knows {num_tokens}" in said[0]
        assert f"lower vocab_size to {num_tokens}" in said[0]


def test_check_says_that_a_peer_has_ended(running, closed_port, tmp_path):
    code, output = checked(peer_arguments(initial_peers=[with_port(running, closed_port)]), tmp_path)
    assert code == 2
    assert f"127.0.0.1 TCP port {closed_port} refuses: the machine answers, but nothing listens on that port" in output
    assert "-> the other side: the peer has ended, or was started anew with another port" in output
    assert output.splitlines()[-1].startswith("NOT READY: 1 of ")


def test_check_says_that_another_program_answers(running, other_program, tmp_path, monkeypatch):
    monkeypatch.setattr("src.swarm.probe.KNOCK_SECONDS", 0.3)
    code, output = checked(peer_arguments(initial_peers=[with_port(running, other_program)]), tmp_path)
    assert code == 2
    assert f"127.0.0.1 TCP port {other_program} is open, but what answers there is no hivemind peer" in output


@pytest.mark.fails_to_start
def test_check_says_that_the_id_is_wrong(running, tmp_path):
    port = address_of(running)[1]
    address = f"/ip4/127.0.0.1/tcp/{port}/p2p/{OTHER_ID}"
    code, output = checked(peer_arguments(initial_peers=[address]), tmp_path)
    assert code == 2
    assert f"a peer listens at /ip4/127.0.0.1/tcp/{port}, but it does not answer as {OTHER_ID}" in output
    assert "-> the other side: its id changes at each start without --identity_path" in output


def test_check_says_that_the_run_has_other_settings(running, tmp_path):
    card = {**CARD, "--total_steps": "7"}
    code, output = checked(peer_arguments(initial_peers=[running]), tmp_path, make_card=lambda *built: card)
    assert code == 2
    assert "FAILED  settings of the run: --total_steps is 7 here and 5 in the run" in output
    assert "-> take the flags and files of the other peers" in output


@pytest.mark.fails_to_start
def test_check_says_that_the_clock_is_wrong(tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr("hivemind.dht.protocol.get_dht_time", lambda: get_dht_time() + 60.0)
        dht, _ = start_dht(peer_arguments(), Identity(RSAPrivateKey()))
    try:
        code, output = checked(peer_arguments(initial_peers=[visible_addresses(dht)[0]]), tmp_path)
    finally:
        dht.shutdown()
    assert code == 2
    assert "this machine's clock is 60 s behind that of /ip4/127.0.0.1/tcp/" in output
    assert "timedatectl" in output


def test_check_says_that_its_own_port_is_taken(running, other_program, tmp_path):
    own = f"/ip4/127.0.0.1/tcp/{other_program}"
    code, output = checked(peer_arguments(host_maddrs=[own], initial_peers=[running]), tmp_path)
    assert code == 2
    assert f"own address {own}: cannot listen: Address already in use" in output
    assert f"listens on TCP port {other_program}: end it" in output


def test_check_says_that_the_model_is_wrong_and_goes_on(tmp_path):
    def build_model():
        raise ValueError("--model_config_path: there is no file nowhere.json;\n pass a model configuration")

    code, output = checked(peer_arguments(), tmp_path, build_model=build_model)
    assert code == 2
    assert "FAILED  model and tokenizer: --model_config_path: there is no file nowhere.json; pass a model" in output
    assert "ok  peer-to-peer daemon" in output
    assert "NOT READY: 1 of 6 checks failed: model and tokenizer" in output


def test_check_says_that_the_data_are_wrong(tmp_path):
    def read_data(tokenizer):
        assert tokenizer == range(300)
        raise ValueError("--dataset_sources: empty.txt has no text")

    code, output = checked(peer_arguments(), tmp_path, read_data=read_data)
    assert code == 2
    assert "FAILED  data: --dataset_sources: empty.txt has no text" in output


def test_check_makes_no_key_and_names_a_peer_that_runs_with_it(tmp_path):
    path = tmp_path / "keys" / "own.key"
    code, output = checked(peer_arguments(identity_path=str(path)), tmp_path)
    assert code == 0 and f"{path} will be made" in output, output
    assert not path.parent.exists()
    create_key(path)
    holder = load_identity(peer_arguments(identity_path=str(path)))
    code, output = checked(peer_arguments(identity_path=str(path)), tmp_path)
    assert code == 2
    assert "FAILED  peer-to-peer daemon: --identity_path" in output
    assert "a running peer on this machine has this identity" in output, output
    os.close(holder.lock)


def test_check_does_not_mind_that_one_of_several_peers_is_away(running, closed_port, tmp_path):
    code, output = checked(peer_arguments(initial_peers=[with_port(running, closed_port), running]), tmp_path)
    assert code == 0, output
    assert f"warning  initial peer {with_port(running, closed_port)}" in output
    assert output.splitlines()[-1].endswith("1 warnings")


def test_check_of_a_client_tests_no_port_of_its_own(running, tmp_path):
    code, output = checked(peer_arguments(initial_peers=[running], client_mode=True), tmp_path)
    assert code == 0, output
    assert "own " not in output
    assert "Mbit/s to it" in output


@pytest.mark.parametrize(
    ("error", "state", "found", "fix"),
    [
        (None, OK, "the hub knows the token of me", ""),
        (ValueError("401: Invalid; log in or set HF_TOKEN"), FAILED, "401: Invalid", "log in or set HF_TOKEN"),
        (ConnectionError("refused"), WARNING, "the hub cannot be asked (refused)", "look at the network"),
    ],
)
def test_check_of_uploads_says_whether_the_token_will_do(monkeypatch, error, state, found, fix):
    def check_token(api, repo_id):
        if error is not None:
            raise error
        return "me"

    monkeypatch.setattr(machine, "check_token", check_token)
    monkeypatch.setattr(machine, "give_up_on_silence", lambda seconds: None)
    check = machine.check_uploads(None, "me/x")
    assert (check.name, check.state, check.found) == ("uploads to me/x", state, found) and check.fix.startswith(fix)


def test_check_reports_uploads_that_will_fail(running, tmp_path):
    failed = check_module.Check("uploads to me/x", FAILED, "this machine has no token", "set HF_TOKEN")
    code, output = checked(peer_arguments(initial_peers=[running]), tmp_path, check_uploads=lambda: failed)
    assert code == 2 and "NOT READY: 1 of" in output and "uploads to me/x: this machine has no token" in output


@pytest.mark.timeout(300)
def test_check_as_a_person_starts_it(running, closed_port, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CHECK_TEST": str(tmp_path)}

    def start(script, *arguments):
        command = [sys.executable, str(REPOSITORY / script), "--check", "--host_maddrs", LOOPBACK, *arguments]
        return subprocess.Popen(command, cwd=tmp_path,
                                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)  # fmt: skip

    trainer = start("run_trainer.py", "@demo/trainer.args", "--initial_peers", with_port(running, closed_port))
    auxiliary = start("run_aux_peer.py", "@demo/aux.args", "--initial_peers", running, "--bandwidth", "auto")
    outputs = [program.communicate(timeout=240) for program in (trainer, auxiliary)]
    assert (trainer.returncode, auxiliary.returncode) == (2, 0), outputs
    assert "a batch of 16 x 64 tokens " in outputs[0][0] and "batch" not in outputs[1][0]
    assert outputs[0][0].splitlines()[-1].startswith("NOT READY: 1 of 9 checks failed: initial peer /ip4/127"), outputs
    assert outputs[1][0].splitlines()[-1].startswith("READY"), outputs
    assert [error for _, error in outputs] == ["", ""]
    assert list(tmp_path.iterdir()) == []
    left = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("CHECK_TEST") == str(tmp_path) and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process)
        except psutil.Error:
            continue
    assert left == []


# -- single checks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knocked", "state", "words"),
    [
        (Knock("203.0.113.5", 31337, True, True, 0.042), OK, ["203.0.113.5 TCP port 31337 answers after 42 ms"]),
        (Knock("203.0.113.5", 31337, False, error="timeout"), FAILED,
         ["203.0.113.5 TCP port 31337 does not answer", "the other side", "firewall", "this side"]),
        (Knock("192.168.1.5", 31337, False, error="timeout"), FAILED, ["a private address"]),
        (Knock("peer.example", 1, False, error="unknown host"), FAILED, ["known for the name peer.example"]),
        (Knock("203.0.113.5", 1, False, error="Network is unreachable"), FAILED, ["is unreachable", "this side"]),
    ],
)  # fmt: skip
def test_check_says_which_side_is_wrong(knocked, state, words):
    check = explain_knock("initial peer", knocked)
    assert check.state == state
    for word in words:
        assert word in check.lines()


@pytest.mark.parametrize(("offset", "words"), [(-60.0, "60 s ahead of"), (60.0, "60 s behind"), (0.5, "within 0.5 s")])
def test_check_compares_clocks(monkeypatch, offset, words):
    monkeypatch.setattr(network, "ping", lambda dht, peer_id: Ping(0.01, offset))
    _, clock = network.check_contact("/ip4/203.0.113.5/tcp/1/p2p/Qm", dht=None)
    assert (clock.state == OK) == (abs(offset) < 3)
    assert words in clock.found


@pytest.mark.parametrize(
    ("tried", "state", "words"),
    [
        ([Knock("198.51.100.7", 31337, False, error="timeout")], FAILED,
         ["/ip4/203.0.113.5/tcp/1 cannot reach this machine at 198.51.100.7 TCP port 31337 (timeout)",
          "--client_mode"]),
        ([Knock("198.51.100.7", 31337, True)], FAILED, ["(another program answers)"]),
        ([Knock("10.0.0.1", 1, False, error="refused"), Knock("198.51.100.7", 1, True, True)], OK, ["198.51.100.7"]),
        (None, WARNING, ["could not test it"]),
    ],
)  # fmt: skip
def test_check_tells_what_others_see_of_the_own_port(monkeypatch, tried, state, words):
    monkeypatch.setattr(network, "ask_to_knock", lambda dht, peer_id, ports: tried if ports == [5, 31337] else 1 / 0)
    monkeypatch.setattr(network, "visible_addresses", lambda dht: ["/ip4/127.0.0.1/tcp/31337/p2p/Qm"])
    check = network.check_reachability(None, "/ip4/203.0.113.5/tcp/1/p2p/Qm", announced=["/ip4/198.51.100.7/tcp/5"])
    assert check.state == state
    for word in words:
        assert word in check.lines()


def test_check_of_a_trainer_that_may_be_a_client_only_warns():
    closed = Check("own port from outside", FAILED, "x cannot reach this machine",
                   "this side: open the port, or run a trainer with --client_mode")  # fmt: skip
    warned = network.or_client(closed)
    assert (warned.state, warned.fix) == (WARNING, "this side: open the port")
    assert "goes on as a client" in warned.found
    assert network.or_client(Check("own port from outside", OK, "x reaches it")).state == OK


@pytest.mark.parametrize(
    ("called", "own", "advice"),
    [
        ("2001:db8::7", "/ip4/198.51.100.7/tcp/31337/p2p/Qm", "add /ip6/::/tcp/PORT to --host_maddrs"),
        ("198.51.100.7", "/ip6/2001:db8::7/tcp/31337/p2p/Qm", "add /ip4/0.0.0.0/tcp/PORT to --host_maddrs"),
        ("2001:db8::7", "/ip6/2001:db8::7/tcp/31337/p2p/Qm", "open the port in the firewall"),
        ("198.51.100.7", "/dns4/peer.example/tcp/31337/p2p/Qm", "open the port in the firewall"),
    ],
)
def test_check_tells_a_missing_kind_of_address_from_a_firewall(monkeypatch, called, own, advice):
    tried = [Knock(called, 31337, open=False, error="refused")]
    monkeypatch.setattr(network, "ask_to_knock", lambda *_: tried)
    monkeypatch.setattr(network, "visible_addresses", lambda dht: [own])
    check = network.check_reachability(None, "/ip6/2001:db8::1/tcp/1/p2p/Qm", announced=[])
    assert check.state == FAILED and advice in check.fix


@pytest.mark.parametrize(
    ("speed", "given", "state", "words"),
    [
        (Speed(100.0, 20.0), None, OK, "100 Mbit/s from the peer, 20 Mbit/s to it; use --bandwidth 20, or auto"),
        (Speed(100.0, 20.0), 100.0, WARNING, "but --bandwidth is 100"),
        (Speed(100.0, 20.0), "auto", OK, "20 Mbit/s to it"),
        (None, None, WARNING, "did not take part"),
    ],
)
def test_check_judges_the_bandwidth(speed, given, state, words):
    check = describe_speed(speed, "the peer", given)
    assert check.state == state
    assert words in check.found


# The one source of what is needed is predict_memory; these are small against it.
LARGE = LeanAlbertConfig(hidden_size=1024, intermediate_size=4096, num_attention_heads=16, num_hidden_layers=24,
                         vocab_size=50_000, share_large_matrices=0)  # fmt: skip
LIBRARIES = machine.TRAINER_LIBRARIES


def predicted(batch_size: int = 8, **options):
    return predict_memory(LARGE, **{"batch_size": batch_size, "length": 512, "bf16": True, **options})


def test_check_of_disk(tmp_path, monkeypatch):
    memory = predicted()
    assert machine.check_disk(tmp_path / "a" / "b", memory).state == OK
    (tmp_path / "file").write_text("")
    assert "choose another --output_dir" in machine.check_disk(tmp_path / "file" / "a", memory).lines()
    backups = 2 * (memory.parameters + memory.optimizer)
    assert backups > 2e9
    for spare, state in ((0, FAILED), (2e8, OK)):
        usage = namedtuple("usage", "free")(int(backups + spare))
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda path, usage=usage: usage)
        assert machine.check_disk(tmp_path, memory).state == state


@pytest.mark.parametrize(("spare", "state"), [(0.99, FAILED), (1.01, OK)])
def test_check_of_shared_memory(tmp_path, monkeypatch, spare, state):
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    model = torch.nn.Linear(1000, 1000)
    needed = 4 * 4 * 1_001_000
    usage = namedtuple("usage", "free")(int(spare * needed))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    check = machine.check_shared_memory(model)
    assert check.state == state and str(tmp_path) in check.found
    if state == OK:
        machine.require_shared_memory(model)
    else:
        assert "docker run --shm-size 1g" in check.fix
        with pytest.raises(ValueError, match=r"^too little shared memory: 0\.02 GB are needed .*--shm-size 1g"):
            machine.require_shared_memory(model)


def test_check_of_shared_memory_that_is_read_only_or_not_there(tmp_path, monkeypatch):
    model = torch.nn.Linear(1, 1)
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "none")
    assert machine.check_shared_memory(model).state == OK
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(machine.os, "access", lambda *_: False)
    assert "nothing can be written" in machine.check_shared_memory(model).lines()


WORKLOAD = Workload(2**20, batch_size=8, length=512, half_precision=True)


@pytest.mark.parametrize(("spare", "state"), [(0.99, FAILED), (1.05, WARNING), (1.15, OK)])
def test_check_of_memory(monkeypatch, spare, state):
    needed = predicted().total + 2 * predicted().parameters + LIBRARIES
    monkeypatch.setattr(machine, "available_memory", lambda: spare * needed)
    (check,) = machine.check_memory(LARGE, WORKLOAD, torch.device("cpu"))
    assert check.state == state
    assert check.found.startswith(f"{needed / 1e9:.2f} GB are needed (model and gradients ")
    activations, optimizer = predicted().device - 2 * predicted().parameters, predicted().optimizer
    assert f"a batch of 8 x 512 tokens {activations / 1e9:.2f}, optimizer {optimizer / 1e9:.2f}, " in check.found
    assert check.found.endswith(f"{spare * needed / 1e9:.2f} GB are free")


@pytest.mark.parametrize(("spare", "state"), [(0.99, FAILED), (1.05, WARNING), (1.15, OK)])
def test_check_of_gpu_memory(monkeypatch, spare, state):
    needed = predicted().device + machine.GPU_LIBRARY_BYTES
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (spare * needed, 80e9))
    host = 2 * predicted().optimizer + 3 * predicted().parameters + LIBRARIES  # with a state that it takes
    monkeypatch.setattr(machine, "available_memory", lambda: 1.2 * host)
    memory, gpu_memory = machine.check_memory(LARGE, WORKLOAD, torch.device("cuda"))
    assert (memory.state, gpu_memory.state) == (OK, state), "the optimizer and the swarm's copies are not on the GPU"


@pytest.mark.parametrize(
    ("gpu", "length", "fix"),
    [
        (predicted(4).device, 512, "--per_device_train_batch_size 4 fits (raise --gradient_accumulation_steps"),
        (predicted(1).device - 1e6, 512, "--activation_memory lean --per_device_train_batch_size"),
        (predicted(1).parameters, 512, "use a machine with more memory, a smaller --model_config_path"),
    ],
)
def test_check_of_memory_says_what_fits(monkeypatch, gpu, length, fix):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu + machine.GPU_LIBRARY_BYTES, 80e9))
    check = machine.check_memory(LARGE, WORKLOAD, torch.device("cuda"))[1]
    assert check.state == FAILED and check.fix.startswith(fix)
    if "size 4" in fix:
        smaller = Workload(2**20, batch_size=4, length=512, half_precision=True)
        assert machine.check_memory(LARGE, smaller, torch.device("cuda"))[1].state != FAILED, "the advice is right"


@pytest.mark.parametrize(("spare", "fix"), [(0.99, "use a machine with more memory"), (1.15, "")])
def test_check_of_memory_leaves_room_for_a_state_where_batches_are_small(monkeypatch, spare, fix):
    memory, workload = predicted(1, length=64), Workload(2**20, batch_size=1, length=64, half_precision=True)
    needed = 5 * memory.parameters + 2 * memory.optimizer + LIBRARIES  # the fifth copy comes from another peer
    monkeypatch.setattr(machine, "available_memory", lambda: spare * needed)
    (check,) = machine.check_memory(LARGE, workload, torch.device("cpu"))
    assert (check.state == FAILED) == bool(fix) and "a state that is taken" in check.found
    assert (check.fix or "").startswith(fix)


def test_check_of_memory_of_an_auxiliary_peer_counts_no_batch(monkeypatch):
    no_8bit = 2**40
    memory = predicted(0, min_8bit_size=no_8bit)
    assert memory.optimizer == 2 * memory.parameters
    needed = 4 * memory.parameters + memory.optimizer + machine.AUXILIARY_LIBRARIES
    for spare, state in ((0.99, FAILED), (1.15, OK)):
        monkeypatch.setattr(machine, "available_memory", lambda spare=spare: spare * needed)
        (check,) = machine.check_memory(LARGE, Workload(no_8bit), torch.device("cpu"))
        assert check.state == state and "batch" not in check.lines(), check


def test_check_knows_the_memory_of_this_machine():
    assert 1e8 < machine.available_memory() <= psutil.virtual_memory().total


@pytest.mark.parametrize(("hard", "state"), [(1024, FAILED), (4096, OK), (-1, OK)])
def test_check_of_open_files(monkeypatch, hard, state):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda kind: (256, hard))
    assert machine.check_open_files().state == state


def test_check_of_identity(tmp_path):
    assert machine.check_identity(None).state == OK
    assert "will be made" in machine.check_identity(str(tmp_path / "new.key")).found
    for content in (b"", b"no key at all"):
        (tmp_path / "bad.key").write_bytes(content)
        assert machine.check_identity(str(tmp_path / "bad.key")).state == FAILED
    dht, _ = start_dht(peer_arguments(identity_path=str(tmp_path / "good.key")))
    dht.shutdown()
    assert machine.check_identity(str(tmp_path / "good.key")).state == OK


# -- the other side ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joined(running):
    dht, _ = start_dht(peer_arguments(initial_peers=[running]), Identity(RSAPrivateKey()))
    yield dht
    dht.shutdown()


def test_probe_measures_round_trip_and_speed_against_a_peer(running, joined):
    peer_id = running.rsplit("/", 1)[-1]
    answer = ping(joined, peer_id)
    assert 0 < answer.seconds < 5
    assert abs(answer.clock_offset) < 1, "the same machine"
    started = time.monotonic()
    speed = measure_speed(joined, peer_id)
    assert 1 < speed.bandwidth <= max(speed.download, speed.upload) < 1e5
    assert time.monotonic() - started < 60
    assert measure_bandwidth(joined, [f"{LOOPBACK}/p2p/{OTHER_ID}", running]) > 1, "the first that answers"
    with pytest.raises(ValueError, match="--bandwidth auto: no initial peer answers"):
        measure_bandwidth(joined, [f"{LOOPBACK}/p2p/{OTHER_ID}"])


def test_probe_knocks_on_the_callers_own_ports(running, joined, closed_port, other_program):
    own = address_of(visible_addresses(joined)[0])[1]
    knocked = ask_to_knock(joined, running.rsplit("/", 1)[-1], [own, closed_port, other_program, 0, 70000])
    assert [(one.port, one.open, one.is_peer, one.error) for one in knocked] == [
        (own, True, True, ""), (closed_port, False, False, "refused"), (other_program, True, False, ""),
    ]  # fmt: skip
    assert {one.host for one in knocked} == {"127.0.0.1"}, "where the peer sees the caller"


def test_probe_that_nobody_answers(joined):
    assert ping(joined, OTHER_ID) is None
    assert measure_speed(joined, OTHER_ID) is None
    assert ask_to_knock(joined, OTHER_ID, [1]) is None


@pytest.mark.parametrize("known", [None, (17, 3.0)])
def test_peer_says_in_which_epoch_the_swarm_is_to_whoever_asks_it(running, running_dht, joined, known):
    tell_epoch(running_dht, known)
    answer = ask_epoch(joined, [running, f"{LOOPBACK}/p2p/{OTHER_ID}"])
    assert answer == known if known is None else (answer[0] == 17 and 3.0 <= answer[1] < 10.0)
    assert ask_epoch(joined, []) is None
    assert ask_epoch(joined, [f"{LOOPBACK}/p2p/{OTHER_ID}"]) is None
    assert ask_epoch(running_dht, [running]) is None, "nobody asks itself"


def test_who_answers_can_be_reached(running, joined):
    peer_id = running.rsplit("/", 1)[-1]
    assert reachable(joined, [peer_id, OTHER_ID]) == {peer_id}
    assert reachable(joined, []) == set()


@pytest.mark.parametrize("answer", [b"[1]", b"[-1, 0.0]", b"[1, NaN]", b'["a", 0.0]', b"[1, -5.0]", b"[" * 4000,
                                    b"\xff", b"[1, 1e300]", b"[" + b"9" * 1000 + b", 0.0]", b"{}"])  # fmt: skip
def test_epoch_that_makes_no_sense_is_none(monkeypatch, answer):
    async def rpc_epoch(request):
        return Tensor(buffer=answer)

    monkeypatch.setattr(ConnectionProbe, "get_stub", lambda p2p, peer: SimpleNamespace(rpc_epoch=rpc_epoch))
    node = SimpleNamespace(p2p=None, peer_id=PeerID.from_base58(OTHER_ID))
    some_peer = "QmRD2odZinevcVSAJ5BhFnLAgfm9jYN2wLNQhhDWX1q4qR"
    assert asyncio.run(_ask_epoch(None, node, peer_ids=[some_peer])) == []


async def silent(*messages: bytes):
    for message in messages:
        yield Tensor(buffer=message)
    await asyncio.sleep(3600)


@pytest.mark.parametrize("silent_callers", [1, 20])
def test_probe_waits_for_nobody_who_is_silent(monkeypatch, silent_callers):
    monkeypatch.setattr("src.swarm.probe.MAX_SECONDS", 0.5)
    monkeypatch.setattr("src.swarm.probe.SILENT_SECONDS", 2.0)

    async def scenario():
        probe, started = ConnectionProbe(None), time.monotonic()
        held = [asyncio.create_task(probe.rpc_receive(silent(b"abc"), SimpleNamespace(remote_id=f"stranger {n}")))
                for n in range(silent_callers)]  # fmt: skip
        not_read = probe.rpc_send(Tensor(), SimpleNamespace(remote_id="reads the first chunk only"))
        await anext(not_read)
        async for chunk in probe.rpc_send(Tensor(), SimpleNamespace(remote_id="honest")):
            assert len(chunk.buffer) == CHUNK_BYTES
            break
        assert not any(call.done() for call in held), "before the silent ones are given up"
        answers = await asyncio.gather(*held)
        assert [answer.buffer for answer in answers] == [b"3"] * silent_callers
        assert time.monotonic() - started < 20.0, "one after the other, 20 silent ones would take 40 s"

    asyncio.run(scenario())


def test_what_another_peer_says_of_a_port_is_short_and_printable():
    said = {
        "host": "\x1b[2J" + "h" * 10**6,
        "port": 5,
        "open": True,
        "is_peer": "yes",
        "seconds": 0.5,
        "error": "\u202e",
    }
    heard = _knock_of(said)
    assert heard.host.isprintable() and len(heard.host) <= 60 and heard.error == ""
    assert heard.open and not heard.is_peer
    for wrong in ({}, [], "text", {**said, "port": "x"}, {**said, "seconds": []}):
        with pytest.raises(Exception):  # noqa: B017, the caller takes any
            _knock_of(wrong)


def test_probe_gives_no_more_than_its_share(monkeypatch):
    clock = SimpleNamespace(monotonic=lambda: 10.0)
    monkeypatch.setattr("src.swarm.probe.time", clock)
    probe = ConnectionProbe(None)
    assert probe._spend(BYTES_AN_HOUR)
    assert not probe._spend(1)
    clock.monotonic = lambda: 3700.0
    assert probe._spend(1), "a new hour"


@pytest.mark.parametrize(
    ("address", "expected"),
    [("/ip4/1.2.3.4/tcp/5/p2p/Qm", ("1.2.3.4", 5)), ("/dns4/a.example/tcp/5", ("a.example", 5)),
     ("/ip6/::1/tcp/5", ("::1", 5)), ("/ip4/1.2.3.4/udp/5/quic", (None, None)),
     ("/ip4/1.2.3.4/tcp/5/p2p/Qm/p2p-circuit/p2p/Qn", (None, None)), ("/p2p/Qm", (None, None)), ("", (None, None))],
)  # fmt: skip
def test_probe_address_of_a_multiaddress(address, expected):
    assert address_of(address) == expected


# -- what the run hands over ------------------------------------------------------------------------------------------


def settled(peer, tmp_path, **given) -> tuple[object, str]:
    """What is known of the run's settings, and what was said."""
    said = []
    peer.check = True
    given = {"output_dir": str(tmp_path), "dataset_sources": ["a.txt"], **given}
    with settings_for_check(peer, given, reads_text=True, say=said.append) as entry:
        return entry, "\n".join(said)


@pytest.mark.fails_to_start
def test_check_without_anybody_goes_by_what_was_kept(tmp_path, closed_port):
    nobody = f"/ip4/127.0.0.1/tcp/{closed_port}/p2p/QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC"
    peer = peer_arguments(initial_peers=[nobody])
    entry, said = settled(peer, tmp_path)
    assert (entry.manifest, list(entry.words), said) == (None, [], "") and list(tmp_path.iterdir()) == []
    files = make_files(CONFIG, TOKENIZER)
    manifest = make_manifest("check", DEFAULTS, files)
    write_folder(folder_of(str(tmp_path), "check"), manifest, files)
    entry, said = settled(peer, tmp_path)
    assert entry.manifest == manifest and "--learning_rate=0.0025" in entry.words and said == ""
    entry, said = settled(peer, tmp_path, learning_rate=0.5)
    assert entry is None and "FAILED  settings of the run: --learning_rate is 0.5 here and 0.0025 in the run" in said
    assert said.splitlines()[-1].startswith("NOT READY: 1 of 1 checks failed")
