"""The visitor's helper, as a program: standard input and output, a local port, beneath ssh."""

import argparse
import contextlib
import errno
import hashlib
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading

import pytest
from support import (
    GATEWAY_HOST,
    MIB,
    RAW,
    ROOT,
    TIMEOUT,
    Origin,
    Wire,
    agent_here,
    deaf_port,
    gateway_here,
    need,
    reserved_port,
    routes_of,
    running,
    sshd,
    wait_until,
)

from gotunnel import NoThread
from gotunnel_agent import forward
from gotunnel_server.certs.local_ca import Authority

AGENT = [sys.executable, str(ROOT / "gotunnel_agent")]
SSH = "ssh.localhost"
AT_ONCE = 5  # seconds, on a busy machine


@pytest.fixture
def gateway(cache, tmp_path, origin):
    """A gateway whose agent serves RAW from the origin."""
    with gateway_here(cache) as gateway, agent_here(gateway, tmp_path, tcp={RAW: origin.port}):
        yield gateway


def words(gateway, hostname=RAW):
    """The arguments that lead to a hostname of a gateway."""
    return [
        "forward", "--ca-file", str(gateway.ca_file), "--via", "127.0.0.1",
        f"{hostname}:{gateway.public_port}",
    ]  # fmt: skip


class Helper:
    """A running `gotunnel-agent forward` whose standard input and output the test holds."""

    def __init__(self, arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE):
        self.process = subprocess.Popen(
            [*AGENT, *arguments], stdin=stdin, stdout=stdout, stderr=subprocess.PIPE
        )

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.process.kill()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with contextlib.suppress(OSError):  # the process ended before it read all
                    pipe.close()
        self.process.wait(TIMEOUT)

    def send(self, data):
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def read_exactly(self, count):
        return self.process.stdout.read(count)

    def finish(self):
        self.process.stdin.close()

    def end(self) -> tuple:
        """Wait until it ends by itself: its status and its standard error."""
        status = self.process.wait(TIMEOUT)
        return status, self.process.stderr.read().decode()


def run(arguments, said=b"", **named):
    """Run it with ``said`` on standard input: status, standard output, standard error."""
    done = subprocess.run(
        [*AGENT, *arguments], input=said, capture_output=True, timeout=TIMEOUT, **named
    )
    return done.returncode, done.stdout, done.stderr.decode()


def fails(arguments, *texts, status=1):
    """Run it; expect one line on standard error that contains all of ``texts``."""
    got, stdout, stderr = run(arguments)
    assert (got, stdout) == (status, b""), stderr
    assert re.fullmatch(r"gotunnel-agent forward: [^\n]+\n", stderr)
    for text in texts:
        assert text in stderr


def echo(target):
    while data := target.read():
        target.send(data)
    target.finish()


# Standard input and output -----------------------------------------------------------------------


def test_stdio_carries_bytes_both_ways_and_nothing_else(gateway, origin):
    with Helper(words(gateway)) as helper, origin.accept() as target:
        target.send(b"SSH-2.0-first\r\n")
        assert helper.read_exactly(15) == b"SSH-2.0-first\r\n"
        helper.send(b"\0\r\n\xff")
        assert target.read_exactly(4) == b"\0\r\n\xff"
        target.close()
        assert helper.end() == (0, "")
        assert helper.process.stdout.read() == b""


def test_end_of_input_is_a_half_close_and_the_answer_still_comes(gateway, origin):
    with Helper(words(gateway)) as helper, origin.accept() as target:
        helper.send(b"question")
        helper.finish()
        assert target.read_to_end() == b"question"
        answer = random.Random(1).randbytes(MIB)
        sender = threading.Thread(target=lambda: (target.send(answer), target.close()))
        sender.start()
        assert helper.process.stdout.read() == answer
        sender.join(TIMEOUT)
        assert helper.end() == (0, "")


def test_it_ends_when_the_other_side_has_also_if_its_input_stays_open(gateway, origin):
    with Helper(words(gateway)) as helper, origin.accept() as target:
        target.send(b"bye")
        target.close()
        assert helper.read_exactly(3) == b"bye"
        assert helper.end() == (0, "")


def test_input_may_be_a_file_and_20_mb_come_back_as_they_were_sent(gateway, origin, tmp_path):
    origin.serve(echo)
    data = random.Random(2).randbytes(20_000_000)
    (tmp_path / "data").write_bytes(data)
    with open(tmp_path / "data", "rb") as file, open(tmp_path / "back", "wb") as back:
        done = subprocess.run([*AGENT, *words(gateway)], stdin=file, stdout=back, timeout=TIMEOUT)
    assert done.returncode == 0
    came = (tmp_path / "back").read_bytes()
    assert hashlib.sha256(came).digest() == hashlib.sha256(data).digest()


def test_both_may_be_one_socket_that_does_not_block(gateway, origin):
    """OpenSSH gives its ProxyCommand one socket for both; here it is also non-blocking."""
    ours, its = socket.socketpair()
    its.setblocking(False)
    with its, Wire(_NoDelay(ours)) as wire:
        with Helper(words(gateway), stdin=its, stdout=its) as helper, origin.accept() as target:
            data = random.Random(3).randbytes(MIB)
            sender = threading.Thread(target=target.send, args=(data,))
            sender.start()
            assert wire.read_exactly(MIB) == data
            sender.join(TIMEOUT)
            wire.send(b"heard")
            assert target.read_exactly(5) == b"heard"
            ours.shutdown(socket.SHUT_WR)
            assert target.read_to_end() == b""
            target.close()
            assert helper.end() == (0, "")


class _NoDelay:
    """A unix socket that Wire can use like a TCP socket."""

    def __init__(self, sock):
        self._sock = sock

    def setsockopt(self, *option):
        pass

    def __getattr__(self, name):
        return getattr(self._sock, name)


def test_reader_that_has_gone_ends_it_without_a_word(gateway, origin):
    with Helper(words(gateway)) as helper, origin.accept() as target:
        helper.process.stdout.close()
        target.send(b"for nobody")
        assert helper.end() == (0, "")
        with pytest.raises(ConnectionResetError):
            target.read_to_end()


def test_output_that_cannot_be_written_is_said(gateway, origin):
    with open("/dev/full", "wb") as full, Helper(words(gateway), stdout=full) as helper:
        with origin.accept() as target:
            target.send(b"x")
            status, stderr = helper.end()
    assert status == 1 and "standard output cannot be written (No space left" in stderr


def test_input_that_cannot_be_read_is_said(gateway, tmp_path):
    with open(tmp_path / "to be written", "wb") as file:
        with Helper(words(gateway), stdin=file) as helper:
            status, stderr = helper.end()
    assert status == 1 and "standard input cannot be read (Bad file descriptor)" in stderr


def test_closed_input_is_said(gateway):
    command = shlex.join([*AGENT, *words(gateway)]) + " <&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=TIMEOUT)
    assert done.returncode == 1 and b"standard input or output is closed" in done.stderr


def test_error_never_stands_on_standard_output():
    command = shlex.join([*AGENT, "forward", "nowhere.invalid"]) + " 2>&-"
    done = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, timeout=TIMEOUT)
    assert (done.returncode, done.stdout) == (1, b"")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_it_at_once_and_what_was_cut_does_not_look_complete(gateway, origin, number):
    with Helper(words(gateway)) as helper, origin.accept() as target:
        helper.send(b"half of it")
        assert target.read_exactly(10) == b"half of it"
        helper.process.send_signal(number)
        assert helper.process.wait(AT_ONCE) == -number
        assert helper.end()[1] == ""
        with pytest.raises(ConnectionResetError):
            target.read_to_end()


def test_last_words_before_a_hangup_are_passed_on(gateway, origin):
    """ssh closes our input and sends SIGHUP."""
    with Helper(words(gateway)) as helper, origin.accept() as target:
        helper.send(b"!")
        assert target.read_exactly(1) == b"!"
        helper.process.send_signal(signal.SIGSTOP)  # so that it finds input, end and signal at once
        helper.send(b"disconnected by user")
        helper.finish()
        helper.process.send_signal(signal.SIGHUP)
        helper.process.send_signal(signal.SIGCONT)
        assert target.read_to_end() == b"disconnected by user"
        target.close()
        assert helper.end() == (0, "")


@pytest.mark.slow
def test_hangup_ends_it_although_the_other_side_does_not(gateway, origin):
    with Helper(words(gateway)) as helper, origin.accept() as target:
        target.send(b"!")
        assert helper.read_exactly(1) == b"!"  # so its signal handlers are set
        helper.process.send_signal(signal.SIGHUP)
        assert helper.process.wait(forward.CLOSING_TIME + AT_ONCE) == -signal.SIGALRM


def test_progress_is_told_on_a_terminal_only_and_not_beneath_ssh(gateway, origin):
    """Beneath ssh standard error is a terminal, and the other two are not."""
    pty = pytest.importorskip("pty")
    origin.serve(echo)
    for ours_too, expected in ((True, rf"connected to {RAW}\r\n.*2 bytes sent, 2 received"),
                               (False, "")):  # fmt: skip
        master, terminal = pty.openpty()
        with open(terminal, "wb", 0) as terminal_file, open(os.devnull, "wb") as nowhere:
            done = subprocess.run(
                [*AGENT, *words(gateway)], input=b"hi", timeout=TIMEOUT, stderr=terminal_file,
                stdout=terminal_file if ours_too else nowhere,
            )  # fmt: skip
            os.write(terminal, b".")  # so that there is something to read
        said = os.read(master, 4096).decode().removesuffix(".")
        os.close(master)
        assert done.returncode == 0
        assert re.search(expected, said, re.S) if expected else said == ""


# What goes wrong ---------------------------------------------------------------------------------


def test_refused_name_is_said(gateway):
    fails(words(gateway, "nobody.localhost"),
          "no tunnel for nobody.localhost at this gateway, or its agent is away")  # fmt: skip


def test_answer_of_the_gateway_itself_is_said_and_not_passed_on(cache, tmp_path, gateway):
    """This gateway has a certificate for RAW, from an earlier run, and no tunnel. It does not know
    either that RAW was in tcp mode: else it would reset the visit."""
    (cache / "served.json").unlink(missing_ok=True)
    with gateway_here(cache) as other, Helper(words(other)) as helper:
        helper.send(b"SSH-2.0-visitor\r\n\r\n")
        status, stderr = helper.end()
        assert status == 1 and helper.process.stdout.read() == b""
    assert "the gateway answers in HTTP (malformed-request): the hostname is not in" in stderr


def test_unknown_ca_is_said_with_what_to_do(gateway):
    fails(["forward", "--via", "127.0.0.1", f"{RAW}:{gateway.public_port}"],
          f"the certificate of {RAW} is not to be trusted", "--ca-file")  # fmt: skip


def test_other_cas_are_said(gateway, tmp_path, monkeypatch):
    other = Authority(tmp_path / "another CA").ca_file

    def refusal(ca_file):
        context = forward.client_context(ca_file)
        place = RAW, "127.0.0.1", gateway.public_port
        with pytest.raises(forward.NoVisit) as caught:
            forward.Destination(*place, context, ca_file).dial()
        return str(caught.value).partition("); ")[2]

    assert refusal(None) == "--ca-file names a CA to trust"
    assert refusal(str(other)) == f"--ca-file names a CA to trust, and {other} names another one"
    monkeypatch.setenv("SSL_CERT_FILE", str(gateway.ca_file))  # a public CA, as it were
    assert refusal(str(other)) == "its CA is one that this system trusts; leave out --ca-file"
    # The looks were visits in tcp mode. They are over, though their target says nothing.
    wait_until(lambda: not any(each.name.startswith("relay") for each in threading.enumerate()), 2)


@pytest.mark.parametrize("via", [(), ("--via", "any.name.localhost")])
def test_names_under_localhost_lead_to_this_machine(gateway, origin, via):
    """With or without --via; the certificate is that of the hostname."""
    origin.serve(echo)
    arguments = ["forward", "--ca-file", str(gateway.ca_file), *via]
    assert run([*arguments, f"{RAW}:{gateway.public_port}"], b"hello") == (0, b"hello", "")


def test_any_certificate_will_do_if_it_is_not_checked(gateway, origin):
    origin.serve(echo)
    arguments = ["forward", "--skip-tls-verify", "--via", "127.0.0.1"]
    arguments.append(f"{RAW}:{gateway.public_port}")
    assert run(arguments, b"hello") == (0, b"hello", "")


def test_certificate_of_another_hostname_is_said(gateway, tmp_path):
    """A server that shows one certificate, whatever SNI it gets."""
    folder = gateway.ca_file.parent
    with reserved_port() as port:
        server = [
            need("openssl"), "s_server", "-accept", f"127.0.0.1:{port}", "-quiet",
            "-cert", str(folder / f"{GATEWAY_HOST}.crt"),
            "-key", str(folder / f"{GATEWAY_HOST}.key"),
        ]  # fmt: skip
        with running(*server, cwd=tmp_path):
            wait_until(lambda: _listens(port))
            fails(["forward", "--ca-file", str(gateway.ca_file), "--via", f"127.0.0.1:{port}", RAW],
                  f"the certificate of {RAW} is not to be trusted", "Hostname mismatch",
                  "is it the right gateway?")  # fmt: skip


def _listens(port):
    with contextlib.suppress(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), TIMEOUT).close()
        return True


def test_target_that_is_down_is_said(cache, tmp_path):
    with reserved_port() as port, gateway_here(cache) as gateway:
        with agent_here(gateway, tmp_path, tcp={RAW: port}):
            fails(words(gateway), "its target is down or its agent is away")


def test_agent_that_is_away_is_said(cache, tmp_path, origin):
    with gateway_here(cache) as gateway:
        with agent_here(gateway, tmp_path, tcp={RAW: origin.port}):
            pass  # the gateway keeps the certificate
        wait_until(lambda: not routes_of(gateway.inner))
        fails(words(gateway), "its target is down or its agent is away")


def test_visit_that_breaks_later_is_said(gateway, origin):
    with Helper(words(gateway)) as helper, origin.accept() as target:
        target.send(b"abc")
        assert helper.read_exactly(3) == b"abc"
        target.reset()
        status, stderr = helper.end()
    assert status == 1 and f"the connection to {RAW} broke after 3 bytes" in stderr


def test_port_without_a_listener_is_said():
    with reserved_port() as port:
        fails(["forward", "--via", f"127.0.0.1:{port}", RAW],
              f"no program listens at 127.0.0.1 port {port}")  # fmt: skip


def test_name_that_does_not_resolve_is_said():
    fails(["forward", "nowhere.invalid"], "nowhere.invalid does not resolve", "--via")


def test_port_that_speaks_no_tls_is_said(origin):
    arguments = ["forward", "--via", f"127.0.0.1:{origin.port}", RAW]
    origin.serve(lambda wire: wire.send(b"SSH-2.0-it\r\n"))
    fails(arguments, f"127.0.0.1 port {origin.port} speaks SSH without TLS; is it a gateway's")


def test_port_that_hangs_up_before_tls_is_said(origin):
    origin.serve(lambda wire: (wire.read(), wire.reset()))
    fails(["forward", "--via", f"127.0.0.1:{origin.port}", RAW], "closed the connection before TLS")


@pytest.mark.parametrize("step", ["port", "TLS"])
def test_gateway_that_does_not_answer_is_said(origin, monkeypatch, step):
    monkeypatch.setattr(forward, "DIAL_TIMEOUT", 0.2)
    context = forward.client_context(None, True)
    with deaf_port() as deaf:
        port, text = (deaf, "answer") if step == "port" else (origin.port, "answer in TLS")
        with pytest.raises(forward.NoVisit, match=f"does not {text} within 0.2 s"):
            forward.Destination(RAW, "127.0.0.1", port, context).dial()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "required: HOST"),
        (["127.0.0.1"], "'127.0.0.1' is no hostname"),
        (["a b"], "'a b' is no hostname"),
        (["https://a.example"], "no hostname"),
        (["a.example:65536"], "no hostname"),
        (["a.example", "65536"], "'65536' is no port"),
        (["a.example", "127.0.0.1"], "'127.0.0.1' is no port"),
        (["--via", "[::1", "a.example"], "'[::1' is no hostname or IP address"),
        (["--ca-file", "/nowhere.pem", "a.example"], "/nowhere.pem: No such file"),
        (["--ca-file", os.devnull, "a.example"], "expected PEM"),
        (["--print-ssh-config", "a.example", "2222"], "takes no LOCAL"),
        (["--skip-tls-verify", "--ca-file", os.devnull, "a.example"], "expected only one of them"),
        (["--what", "a.example"], "unknown argument '--what', expected HOST[:PORT] and LOCAL"),
        (["a.example", "22", "2222"], "unknown argument '2222', expected HOST[:PORT] and LOCAL"),
        (["-p", "2222", "a.example"], "unknown option '-p'; write the port behind HOST: HOST:PORT"),
        (["-L", "2222:b:22", "a.example"], "unknown option '-L'; the local port comes behind HOST"),
        (["--config=x", "a.example"], "unknown option '--config'; forward needs no configuration"),
    ],
)
def test_bad_usage_is_status_2(arguments, text):
    status, stdout, stderr = run(["forward", *arguments])
    assert (status, stdout) == (2, b"") and text in stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("kind", "text", "why"),
    [
        (
            forward.a_destination,
            "https://a.example",
            "; leave out the scheme, which is what stands",
        ),
        (forward.a_destination, "me@a.example", "; leave out the user"),
        (forward.a_destination, "my_app.example.com", "; no hostname has an underscore (_); a "),
        (forward.a_destination, "a.example:https", "; its port is no number"),
        (forward.a_destination, "192.0.2.1", "; it is an IP address, which only --via takes"),
        (forward.a_destination, "192.0.2.1:443", "; it is an IP address, which only --via takes"),
        (forward.a_destination, "5433", "; HOST comes first, LOCAL behind it"),
        (forward.a_destination, "*.example.com", "; a * is for wildcards"),
        (forward.an_address, "https://a.example/", "; leave out the scheme, which is what stands"),
        (forward.an_address, "my_app.example.com:443x", "; its port is no number"),
    ],
)
def test_address_that_is_none_is_told_why(kind, text, why):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        kind(text)
    assert why in str(caught.value) and "no hostname" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.example", ("a.example", 443)),
        ("a.example:8443", ("a.example", 8443)),
        ("[::1]", ("::1", 443)),
        ("[::1]:8443", ("::1", 8443)),
    ],
)
def test_address_is_host_and_port(text, expected):
    assert forward.split_address(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2222", ("127.0.0.1", 2222)),
        (":2222", ("127.0.0.1", 2222)),
        ("auto", ("127.0.0.1", 0)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("[::1]:auto", ("::1", 0)),
    ],
)
def test_local_is_a_port_of_this_machine(text, expected):
    assert forward.a_local(text) == expected


# A local port ------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(arguments, local="auto"):
    """A helper on a free port: the Program, and a function that connects to it."""
    folder = ROOT / "tests"
    with running(*AGENT, *arguments, local, cwd=folder, PYTHONUNBUFFERED="1") as program:
        port = int(program.wait_for(r"^(\d+)$")[1])
        yield program, lambda: Wire(socket.create_connection(("127.0.0.1", port), TIMEOUT))


def test_each_client_of_the_local_port_is_a_visit_of_its_own(gateway, origin):
    with listening(words(gateway)) as (_, dial), contextlib.ExitStack() as stack:
        pairs = []
        for _ in range(5):
            client = stack.enter_context(dial())
            pairs.append((client, stack.enter_context(origin.accept())))
        for number, (client, _) in enumerate(pairs):
            client.send(b"number %d" % number)
            client.finish()
        for number, (_, target) in enumerate(pairs):
            assert target.read_to_end() == b"number %d" % number
            target.send(b"answer %d" % number)
            target.close()
        for number, (client, _) in enumerate(pairs):
            assert client.read_to_end() == b"answer %d" % number


def test_failure_of_one_client_is_one_line_and_leaves_the_others_alone(cache, tmp_path):
    down = "down.localhost"
    with gateway_here(cache) as gateway, listening(words(gateway, down)) as (program, dial):
        for _ in range(2):
            with pytest.raises(ConnectionResetError), dial() as refused:
                refused.read_to_end()
        wait_until(lambda: len(program.lines) == 3)
        for line in program.lines[1:]:
            assert re.search(rf"client 127.0.0.1 port \d+: no tunnel for {down} at", line)
        with Origin() as origin:
            origin.serve(echo)
            with agent_here(gateway, tmp_path, tcp={down: origin.port}), dial() as client:
                client.send(b"hello")
                assert client.read_exactly(5) == b"hello"
                program.signal(signal.SIGINT)
                assert program.wait() == 0
                with pytest.raises(ConnectionResetError):  # a cut visit must not look complete
                    client.read_to_end()
        assert len(program.lines) == 3


def test_client_that_breaks_off_breaks_its_visit_without_a_word(gateway, origin):
    with listening(words(gateway)) as (program, dial):
        client = dial()
        with origin.accept() as target:
            client.send(b"x")
            assert target.read_exactly(1) == b"x"
            client.reset()
            with pytest.raises(ConnectionResetError):
                target.read_to_end()
        with dial(), origin.accept():
            pass
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        assert len(program.lines) == 1


def test_clients_beyond_the_limit_are_refused_until_one_ends(gateway, origin, monkeypatch, caplog):
    monkeypatch.setattr(forward, "MAX_CLIENTS", 1)
    with accepting(gateway, monkeypatch) as dial:
        with dial(), origin.accept() as target:
            with pytest.raises(ConnectionResetError), dial() as second:
                second.read_to_end()
            assert "refused: 1 clients are connected, which is the limit" in caplog.text
            target.finish()
        wait_until(all_served)
        with dial() as third, origin.accept() as target:
            third.send(b"x")
            assert target.read_exactly(1) == b"x"


def test_client_for_whom_there_is_no_thread_is_refused(gateway, monkeypatch, caplog):
    def refuse(name, function, *arguments):
        raise NoThread("can't start new thread")

    monkeypatch.setattr(forward, "spawn", refuse)
    monkeypatch.setattr(forward, "MAX_CLIENTS", 1)  # so a failed client must free its place
    with accepting(gateway, monkeypatch) as dial:
        for _ in range(2):
            with pytest.raises(ConnectionResetError), dial() as client:
                client.read_to_end()
        wait_until(lambda: caplog.text.count("refused: can't start new thread") == 2)


def test_answer_is_read_to_its_end_also_after_its_visit_is_over(gateway, origin, monkeypatch):
    """The kernel keeps part of the answer until the client reads."""
    answer = random.Random(5).randbytes(MIB // 8)
    with accepting(gateway, monkeypatch) as dial, dial() as client:
        with origin.accept() as target:
            client.finish()
            assert target.read_to_end() == b""
            target.send(answer)
        wait_until(all_served)
        assert client.read_to_end() == answer


def test_visit_of_a_client_that_breaks_later_is_said(gateway, origin, monkeypatch, caplog):
    with accepting(gateway, monkeypatch) as dial, dial() as client, origin.accept() as target:
        target.send(b"abc")
        assert client.read_exactly(3) == b"abc"
        target.reset()
        with pytest.raises(ConnectionResetError):
            client.read_to_end()
        wait_until(all_served)
        assert f"the connection to {RAW} broke after 3 bytes" in caplog.text


def test_input_that_the_other_side_takes_no_more_ends_the_visit(monkeypatch):
    """Otherwise ssh would wait for ever."""
    monkeypatch.setattr(forward, "_read_input", lambda: b"x" * MIB)
    ours, theirs = socket.socketpair()
    with theirs, contextlib.closing(forward.End(ours)) as visit:
        visit.stall_timeout = 0.05
        forward._send_input(visit)
        with pytest.raises(OSError):
            visit.read(1, 1)
        with pytest.raises(forward.NoVisit, match="has read nothing for 0.05 s"):
            forward.Destination(RAW, "127.0.0.1", 1, None).check(visit)


def test_client_for_whom_there_is_no_descriptor_is_said_with_what_helps(monkeypatch, caplog):
    class Listening:
        def accept(self):
            raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(forward, "sleep", _stop)
    with pytest.raises(Stopped):
        forward.accept_all(Listening(), None)
    (record,) = caplog.records
    assert record.getMessage().endswith(
        "Too many open files; accepting pauses for 0.1 s; raise the limit (ulimit -n)"
    )


def all_served():
    return not [thread for thread in threading.enumerate() if thread.name.startswith("client")]


@contextlib.contextmanager
def accepting(gateway, monkeypatch):
    """A local port of this process that leads to RAW; yields how to connect to it."""
    context = forward.client_context(str(gateway.ca_file), False)
    destination = forward.Destination(RAW, "127.0.0.1", gateway.public_port, context)
    monkeypatch.setattr(forward, "sleep", _stop)  # ends the listener's loop
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=_until_stopped, args=(listening, destination))
        thread.start()
        try:
            yield lambda: Wire(socket.create_connection(listening.getsockname(), TIMEOUT))
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(TIMEOUT)


class Stopped(Exception):
    pass


def _stop(seconds):
    raise Stopped


def _until_stopped(listening, destination):
    with contextlib.suppress(Stopped):
        forward.accept_all(listening, destination)


def test_port_that_is_taken_is_said(gateway, origin):
    fails([*words(gateway), str(origin.port)],
          f"cannot listen on 127.0.0.1 port {origin.port}: in use, another program listens there; "
          "stop it or choose another port\n")  # fmt: skip


def test_local_name_that_does_not_resolve_is_said():
    fails(["forward", "a.example", "nowhere.invalid:0"],
          "cannot listen on nowhere.invalid: it does not resolve; write an address of this "
          "machine such as 127.0.0.1\n")  # fmt: skip


def test_address_of_another_machine_is_said(gateway):
    fails([*words(gateway), "203.0.113.1:0"],
          "cannot listen on 203.0.113.1 port 0: no address of this machine; choose another\n",
    )  # fmt: skip


# ssh ---------------------------------------------------------------------------------------------


def test_printed_lines_are_all_that_ssh_needs(cache, tmp_path):
    """Pasted into ~/.ssh/config, with blanks, quotes and % in the paths."""
    content = random.Random(4).randbytes(20_000_000)
    (tmp_path / "file").write_bytes(content)
    ssh = need("ssh")
    with sshd(tmp_path) as (port, options), gateway_here(cache) as gateway:
        odd = tmp_path / 'it\'s 100%h "odd" $HOME #1'
        odd.mkdir()
        (odd / "ca.pem").write_bytes(gateway.ca_file.read_bytes())
        arguments = words(gateway, SSH)
        arguments[2] = "ca.pem"  # relative
        status, lines, stderr = run([*arguments, "--print-ssh-config"], cwd=odd)
        assert (status, stderr) == (0, "")
        (tmp_path / "config").write_bytes(lines)
        options = ["-F", str(tmp_path / "config"), *options[2:]]
        with agent_here(gateway, tmp_path, tcp={SSH: port}):
            done = subprocess.run(
                [ssh, *options, SSH, f"cat {shlex.quote(str(tmp_path / 'file'))}"],
                stdin=subprocess.DEVNULL, capture_output=True, timeout=TIMEOUT, cwd=tmp_path,
            )  # fmt: skip
    assert done.stderr == b"" and done.returncode == 0
    assert hashlib.sha256(done.stdout).digest() == hashlib.sha256(content).digest()


@pytest.mark.parametrize(
    ("called", "expected"),
    [
        ("/usr/bin/gotunnel-agent", "/usr/bin/gotunnel-agent forward %h"),
        (str(ROOT / "gotunnel_agent"), None),
        (str(ROOT / "gotunnel_agent" / "__main__.py"), None),
    ],
)
def test_printed_lines_call_the_program_as_it_was_called(monkeypatch, capsys, called, expected):
    monkeypatch.setattr(sys, "argv", [called, "forward"])
    assert forward.main(["--print-ssh-config", "Ssh.Example.Com."]) == 0
    expected = expected or f"{shlex.join([sys.executable, called])} forward %h"
    assert capsys.readouterr().out == f"Host ssh.example.com\n    ProxyCommand {expected}\n"


# The rest of the command line --------------------------------------------------------------------


def test_forward_loads_nothing_that_only_an_agent_needs():
    script = (
        "import runpy, sys; sys.argv = ['gotunnel_agent', 'forward', '--help']\n"
        f"try: runpy.run_path({str(ROOT / 'gotunnel_agent')!r}, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print({'yaml', 'jwt', 'asyncio', 'subprocess', 'gotunnel_agent.agent'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=TIMEOUT)
    assert done.stdout.splitlines()[-1:] == [b"set()"], done.stderr


def test_agents_command_line_is_as_it_was(tmp_path):
    assert run(["--version"])[0] == 0
    status, stdout, stderr = run(["-c", str(tmp_path / "missing.yaml")])
    assert (status, stdout) == (2, b"") and stderr.startswith("gotunnel-agent: ")
    status, stdout, _ = run(["--help"])
    assert status == 0 and b"each with a --help" in stdout and b"gotunnel-agent forward" in stdout
