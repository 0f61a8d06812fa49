"""Recognises common mistakes in an agent's configuration, and says what to write instead.

config.py refuses a wrong file or value, and says what came and what was expected. The functions
here add a few words for the mistakes that many people make: a Windows path in double quotes, the
keys of other tunnel programs, a URL instead of a hostname. Each returns "" if it recognises
nothing. None shows a value that may be a secret.
"""

import codecs
import os
import re

from .common.hostnames import valid_host

UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
QUOTES = "\u201c\u201d\u201e\u201f\u00ab\u00bb\u2018\u2019\u201a\u201b"  # typographic ones

# A token as it stands alone in a file: a JWT in its compact form (RFC 7515 §3.1), whose header is a
# JSON object and so begins with "eyJ".
TOKEN = re.compile(r"eyJ[\w-]+\.[\w-]+\.[\w-]*", re.ASCII)
JOIN_STRING = "gotunnel://"
# A line of a .env file, such as the gateway has, and one of an INI or TOML file.
_SETTING = re.compile(r"(?m)^[ \t]*(export[ \t]+)?[A-Z][A-Z0-9_]*[ \t]*=")
_ASSIGNMENT = re.compile(r"(?m)^[ \t]*[a-z][\w.-]*[ \t]*=")
# A line of YAML with a key, and no blank behind the colon.
_NO_BLANK = re.compile(r"[ \t-]*[A-Za-z_][\w-]*:[^\s/]")
MOST_LOOKED_AT = 1000  # characters of a line: some of these expressions take quadratic time
_NO_BLANK_HYPHEN = re.compile(r"[ \t]*-[A-Za-z]")
_WINDOWS_PATH = re.compile(r"[A-Za-z]:")

_ADDRESS = 'the gateway\'s address is one key here, tunnel_addr: "HOST:PORT"'
_NAME = "here the agent's name is jwt_issuer, beside jwt_secret; a token needs none"
_TOKEN = "here it is token for a token, and jwt_secret for a secret"
_TUNNELS = 'here each hostname is an item of tunnels: - hostname: "HOST" with its target'
_VERIFY = "here it is skip_tls_verify"
_CA = "here it is ca_file, with the path of a file"
_OF_A_TUNNEL = "it belongs into an item of tunnels, not beside tunnels"
# Keys of other tunnel programs: of the Go agents of our wire, and of others that are in wide use.
OTHER_KEYS = {
    **dict.fromkeys(("auth_token", "authtoken", "auth", "api_key"), _TOKEN),
    **dict.fromkeys(("client_id", "client_name", "agent_id", "agent_name", "name"), _NAME),
    "secret": "here it is jwt_secret",
    **dict.fromkeys(("server_addr", "server_port", "server", "server_url", "gateway"), _ADDRESS),
    **dict.fromkeys(("serverAddr", "serverPort", "gateway_addr", "remote_addr"), _ADDRESS),
    "tunnel_id": "a tunnel has no id here; its hostname says which it is",
    **dict.fromkeys(("tunnel_hostnames", "hostnames", "proxies", "ingress", "routes"), _TUNNELS),
    **dict.fromkeys(("insecure", "skip_verify", "insecure_skip_verify"), _VERIFY),
    **dict.fromkeys(("ca", "ca_cert", "cafile", "trusted_ca_file"), _CA),
    **dict.fromkeys(("hostname", "target", "mode", "host_header", "protocol"), _OF_A_TUNNEL),
    **dict.fromkeys(("basic_auth", "allow", "deny", "rate_limit"), _OF_A_TUNNEL),
}
# The same, of one tunnel.
OTHER_TUNNEL_KEYS = {
    **dict.fromkeys(("host", "domain", "subdomain", "custom_domains"), "here it is hostname"),
    **dict.fromkeys(("addr", "service", "url", "upstream", "local_addr", "local_port", "backend"),
                    'here it is target: "HOST:PORT"'),
    **dict.fromkeys(("proto", "type"), "here it is mode: http or tcp"),
    "remote_port": "here it is port, in mode tcp",
    **dict.fromkeys(("tls", "https"), "write https:// in target for a target with TLS"),
    **dict.fromkeys(("group", "group_key", "load_balancer", "pooling", "pooling_enabled"),
                    "agents of one credential share a hostname with pool: true"),
    **dict.fromkeys(("sticky_session", "session_affinity"), "in a pool it is sticky"),
    "ca_file": "for the target's CA it is target_ca_file",
    "skip_tls_verify": "for the target's certificate it is target_skip_tls_verify",
}  # fmt: skip
# Keys of an entry in a gateway's AGENTS_FILE.
_OF_AN_AGENT = {"secret", "secret_file", "hosts", "ports", "limits"}

OTHER_MODES = {
    **dict.fromkeys(
        ("https", "tls", "ssl", "h2", "ws", "wss", "websocket", "grpc", "web"),
        "http is for web sites, WebSockets and gRPC, always with https for visitors; a target with "
        "TLS has https:// in target",
    ),
    **dict.fromkeys(
        ("ssh", "raw", "rdp", "postgres", "mysql", "redis", "stream"),
        "tcp is for everything but web sites",
    ),
    "udp": "udp is not tunnelled",
}
# Schemes in a target whose programs need mode tcp.
_TCP_SCHEMES = ("tcp", "ssh", "postgres", "postgresql", "mysql", "redis", "rdp", "ftp")


# Options that the agent does not have, and no key of a configuration has the name of.
_OPTIONS = {
    **dict.fromkeys(
        ("port", "p"),
        "the gateway's port is a part of tunnel_addr, and a tunnel's own is its key port",
    ),
    **dict.fromkeys(
        ("host", "subdomain", "url"), "gotunnel http PORT --host NAME serves a hostname"
    ),
    **dict.fromkeys(("verbose", "v", "debug"), "log_level: debug in the configuration does that"),
    **dict.fromkeys(("daemon", "d", "background"), "gotunnel-agent service install does that"),
}

_SHARE = "gotunnel http PORT shares a web server, gotunnel files FOLDER a folder"
_JOIN = "gotunnel join STRING stores a credential; gotunnel-server agents add prints STRING"
_ALL = "gotunnel -c FILE serves all tunnels of a configuration, gotunnel http PORT one port"
# Commands of other tunnel programs, and words that users try.
OTHER_COMMANDS = {
    **dict.fromkeys(("authtoken", "auth", "config", "login", "credential", "signup"), _JOIN),
    **dict.fromkeys(("start", "up", "run", "connect", "tunnel", "client"), _ALL),
    **dict.fromkeys(("share", "expose", "serve", "open", "web", "localhost"), _SHARE),
    **dict.fromkeys(
        ("https", "tls"), "gotunnel http https://HOST:PORT shares a web server that speaks TLS"
    ),
    "ssh": "gotunnel tcp 22 shares an SSH server",
    "udp": "udp is not tunnelled",
    "help": "gotunnel --help shows all commands",
    "version": "gotunnel --version shows it",
    **dict.fromkeys(("stop", "down", "kill"), "Ctrl-C or SIGTERM ends a command that runs"),
    **dict.fromkeys(("list", "ls", "ps"), "gotunnel status shows the agent that runs"),
    **dict.fromkeys(
        ("init", "agents", "gateway", "server", "check", "certificates"),
        "gotunnel-server on the gateway's machine has such commands",
    ),
}
# Options of theirs, of a command such as `gotunnel http`.
OTHER_OPTIONS = {
    **dict.fromkeys(
        ("subdomain", "domain", "hostname", "url", "name", "label"), "--host NAME chooses it"
    ),
    **dict.fromkeys(("authtoken", "token"), _JOIN),
    **dict.fromkeys(("cidr-allow", "ip", "allow-ip"), "--allow ADDRESS does that"),
    **dict.fromkeys(("log", "log-level", "debug", "v"), "--verbose does that"),
    **dict.fromkeys(("remote-addr", "remote-port"), "--port of gotunnel tcp does that"),
    **dict.fromkeys(
        ("insecure", "no-tls-verify", "skip-verify"), "--target-skip-tls-verify does that"
    ),
    **dict.fromkeys(("p", "local-port"), "the port stands alone, as in gotunnel http 8080"),
    **dict.fromkeys(("daemon", "d", "background"), "gotunnel-agent service install does that"),
}
# A target without a command: a port, or a host with one.
_TARGET = re.compile(r"(https?://)?([A-Za-z0-9.-]*:)?[0-9]{1,5}/?", re.ASCII)


# --- The command line ----------------------------------------------------------------------------


def of_argument(text: str, keys: tuple[str, ...], tunnel_keys: tuple[str, ...]) -> str:
    """What was meant by an argument that the agent does not have. ``keys`` are those of a
    configuration."""
    if text.startswith(JOIN_STRING):
        return "this is a join string: give it to gotunnel join"
    if TOKEN.fullmatch(text):
        return "this is a token: the key token of a configuration takes it"
    if _TARGET.fullmatch(text):
        return f"did you mean gotunnel http {text}?"
    if os.path.isdir(text):
        return f"did you mean gotunnel files {text}?"
    if not text.startswith("-"):
        return ""
    name = text.lstrip("-").partition("=")[0].replace("-", "_")
    if name in _OPTIONS:
        return _OPTIONS[name]
    if name in keys:
        return f"write {name}: VALUE into the configuration"
    if name in tunnel_keys:
        return f"write {name}: VALUE into a tunnel of the configuration"
    return f"{OTHER_KEYS[name]}, in the configuration" if name in OTHER_KEYS else ""


def shown_argument(text: str) -> str:
    """An argument for a message, without what may be a secret in it."""
    if text.startswith(JOIN_STRING) or TOKEN.fullmatch(text):
        return text[:9] + "..."
    return hidden(text.partition("=")[0] if text.startswith("-") else text)


# --- The file ------------------------------------------------------------------------------------


def base_of(path: str | os.PathLike[str]) -> str:
    """Where a relative path leads from, to be put behind a message; "" for an absolute one."""
    if os.path.isabs(path):
        return ""
    try:
        return f"; a relative path begins in {os.getcwd()}"
    except OSError:  # the working folder is gone
        return ""


def of_bytes(content: bytes) -> str:
    """Why bytes are not UTF-8."""
    if content.startswith(UTF16) or b"\0" in content[:4]:
        return "this looks like UTF-16 (Unicode, as Windows has it): save it as UTF-8"
    return "save the file as UTF-8"


def other_file(text: str) -> str:
    """What a file is that is no mapping of keys to values."""
    if TOKEN.fullmatch(text.strip()):
        return "this is a token: name its file under token_file in a configuration"
    if text.lstrip().startswith(JOIN_STRING):
        return "this is a join string: give it to gotunnel join"
    if "-----BEGIN " in text:
        return "this is a certificate or a key (PEM): ca_file in a configuration names a CA's"
    if re.match(r"\s*- +[\"']?hostname\b", text):
        return "put the list under tunnels:, beside tunnel_addr and a credential"
    if text.lstrip()[:1] == "<":
        return "this is a web page or XML"
    if _SETTING.search(text):
        return (
            "this is a file of settings (NAME=VALUE), such as a gateway's .env; an agent's "
            'configuration is YAML, with lines such as tunnel_addr: "HOST:PORT"'
        )
    if _ASSIGNMENT.search(text):
        return 'this has lines with =, expected YAML with lines such as tunnel_addr: "HOST:PORT"'
    return ""


def other_document(document: dict[str, object]) -> str:
    """What a mapping is that is no configuration."""
    if document and all(
        isinstance(value, dict) and _OF_AN_AGENT & set(value) for value in document.values()
    ):
        return (
            "this is a gateway's AGENTS_FILE; the agent's configuration is what gotunnel-server "
            "agents add has printed"
        )
    return ""


def of_yaml(text: str, line: int, problem: str) -> str:
    """What is wrong with a line of a file that is not YAML; it counts from 0. ``problem`` has
    PyYAML's words."""
    lines = [each[:MOST_LOOKED_AT] for each in text.splitlines()]
    here = lines[line] if line < len(lines) else ""
    before = next((each for each in reversed(lines[:line]) if _has_content(each)), "")
    first = next((each for each in lines if _has_content(each)), "")
    if _SETTING.match(first) or first.startswith(("-----BEGIN ", "<")):
        return other_file(text)
    if "escape" in problem and "double-quoted" in problem:
        return r"in double quotes a \ begins an escape: use single quotes for a Windows path"
    if "'\\t'" in problem:
        return "indent with blanks, as YAML accepts no tab there"
    if "alias" in problem:
        return "put a value that begins with * in quotes"
    if "cannot start any token" in problem:
        return "put a value that begins with such a character in quotes"
    if "end of stream" in problem and "quoted" in problem:
        return "a closing quotation mark is missing"
    if "mapping values" in problem or "simple key" in problem or "expected ':'" in problem:
        if _ASSIGNMENT.match(before) or _ASSIGNMENT.match(here):
            return "YAML has a colon and a blank where a line here has ="
        if _NO_BLANK.match(before) or _NO_BLANK.match(here):
            return "a blank is missing behind a colon, here or in the line before"
        if _NO_BLANK_HYPHEN.match(before) or _NO_BLANK_HYPHEN.match(here):
            return "a blank is missing behind a hyphen, here or in the line before"
        if re.match(r"[ \t-]*[\w-]+: *[^\s\"'].*: ", here):
            return "put a value with a colon and a blank in quotes"
        return "indent the keys of one tunnel alike"
    if "<block end>" in problem and "<scalar>" in problem:
        return "a quotation mark is missing or too many, here or in a line before"
    return ""


def _has_content(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


# --- Values --------------------------------------------------------------------------------------


def of_unprintable(value: str) -> str:
    """Why a text has a line break or an unprintable character."""
    if _WINDOWS_PATH.match(value):
        return r"; in double quotes \t and \n are escapes: use single quotes for a Windows path"
    return ""


def hidden(text: str) -> str:
    """A text without what may be a secret in it: the user and password of a URL."""
    # Each part between slashes and blanks is read once, however long it is.
    return re.sub(r"(?<![^/\s])[^/\s]*@", "...@", text)


def of_quotes(text: str) -> str:
    """Whether the quotation marks of a text are typographic ones, which are part of it."""
    return "; its quotation marks are typographic, use \" or '" if text[:1] in QUOTES else ""


def of_host(text: str) -> str:
    """What is wrong with a public hostname."""
    if "_" in text:
        return "; an underscore is not valid in a hostname: write a hyphen"
    host = _host_of(text)[0]
    return f"; write {host}" if host else ""


def of_tunnel_addr(text: str) -> str:
    """What to write as tunnel_addr instead of ``text``."""
    if text.startswith(JOIN_STRING):
        return "; this is a join string: give it to gotunnel join"
    if any(character.isspace() for character in text):
        return "; leave out the blank"
    if re.search(r"[<>{}$]", text):
        return "; write the gateway's hostname in the place of that"
    if "," in text:
        return '; several addresses are a list: ["A:9443", "B:9443"]'
    host, port = _host_of(text)
    if not host:
        return of_quotes(text)
    advice = "; the port is the gateway's TUNNEL_PORT, 9443 unless it is set"
    return f'; write "{host}:{port or 9443}"' + ("" if port else advice)


def of_target(text: str, mode: str) -> str:
    """What to write as target instead of ``text``."""
    scheme, slashes, rest = text.partition("://")
    scheme = scheme.lower() if slashes else ""
    if text.startswith("/") and len(text) > 1:
        return f'; a unix socket is "unix:{text}"'
    if scheme == "file" or text.startswith(("./", "~")):
        return "; a folder is served by: gotunnel files FOLDER"
    if any(character.isspace() for character in text):
        return "; leave out the blank"
    host, port = _host_of(text)
    if not host:
        return of_quotes(text)
    if scheme in _TCP_SCHEMES:
        hint = "" if mode == "tcp" else " and mode: tcp"
        return f'; write "{host}:{port or "PORT"}"{hint}'
    tls = scheme in ("https", "wss")
    place = f'; write "{"https://" if tls else ""}{host}:{port or (443 if tls else 80)}"'
    path = "/" in (rest if slashes else text).rstrip("/")
    return place + (": a target has no path, the target gets the visitor's" if path else "")


def _host_of(text: str) -> tuple[str, str]:
    """The host of a URL, or of what looks like one, and its port; "" for what it has not."""
    address = text.rpartition("://")[2].rpartition("@")[2].partition("/")[0]
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or port.startswith("0"):
        host, port = address.rstrip(":"), ""
    usable = valid_host(host) and (not port or valid_host(f"{host}:{port}"))
    return (host, port) if usable and not host.isdigit() else ("", "")
