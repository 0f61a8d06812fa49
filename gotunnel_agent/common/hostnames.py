"""The grammar of hostnames: which texts are valid, and the normal form in which they are compared.

Sources: RFC 1123 for hostnames, RFC 3490 and RFC 5891 for internationalised ones (IDNA).
"""

import contextlib
import ipaddress
import re
import unicodedata

MAX_HOSTNAME = 253  # characters: 255 bytes on the DNS wire (RFC 1035 §2.3.4)
MAX_LABEL = 63  # characters between two dots (RFC 1035 §2.3.4)
MAX_PORT = 65535
HTTPS_PORT = 443  # which URLs leave out (RFC 9110 §4.2.2)

# A name, or an IPv6 address in brackets (without a zone, which only one machine understands).
_HOST = re.compile(r"(?P<name>[^][:]+|\[[0-9a-fA-F:.]+\])(:(?P<port>[0-9]{1,5}))?")
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.IGNORECASE | re.ASCII)

# A name as a visitor may send it, in Host or in a ClientHello's SNI. It may have underscores, and
# hyphens at any place, as DNS allows (RFC 2181 §11). No route has such a name, so the visitor gets
# the page for an unknown hostname instead of an error about spelling.
REQUESTED_NAME = r"[0-9A-Za-z_-]+(?:\.[0-9A-Za-z_-]+)*\.?"

WILDCARD = "*."  # before a hostname: all hostnames that end in it
OPEN = ".*"  # behind a label: an open name, which the gateway completes (feature NAMES)

# Characters that IDNA 2003 (RFC 3490, Python's "idna" codec) and IDNA 2008 (RFC 5891, browsers)
# turn into different names. A name with one of them is valid in its xn-- form only.
_AMBIGUOUS = frozenset("\u00df\u1e9e\u03c2\u200c\u200d")


def normal_hostname(name: str) -> str:
    """A hostname's normal form, for comparing: lower case, without a trailing dot, other scripts in
    their xn-- form (so that full-width letters equal plain ones). A name that has no xn-- form
    stays in its script, and is not valid."""
    if not name.isascii() and len(name) <= MAX_HOSTNAME and not _AMBIGUOUS & set(name):
        with contextlib.suppress(UnicodeError):
            name = name.encode("idna").decode()
    return name.lower() if name.endswith("..") else name.lower().removesuffix(".")


def for_socket(name: str) -> str | bytes:
    """A host's name for socket and ssl: as bytes if it is ASCII, as nearly all are. A text would go
    through Python's "idna" codec, whose tables take half a megabyte."""
    return name.encode() if name.isascii() else name


def valid_hostname(name: str) -> bool:
    """Whether a name consists of labels of letters, digits and hyphens (RFC 1123 §2.1).

    An IPv4 address is not valid: the last label of a hostname is never all digits.
    """
    relative = name.removesuffix(".")
    labels = relative.split(".")
    return (
        len(relative) <= MAX_HOSTNAME
        and all(_LABEL.fullmatch(label) for label in labels)
        and not labels[-1].isdigit()
        and ("xn--" not in name.lower() or all(map(_idn_label_or_plain, labels)))
    )


def why_no_hostname(text: str) -> str:
    """What keeps a text from being a hostname, to be put behind a message: "; no hostname has an
    underscore (_)", for example. "" if there is no more to say than what was expected."""
    if not text:
        return ""
    name = text.removesuffix(".")
    labels = name.split(".")
    reasons = (
        ("://" in text, "leave out the scheme, which is what stands before ://"),
        ("/" in text, "leave out the path, which begins with /"),
        ("_" in text, "no hostname has an underscore (_); a hyphen can take its place"),
        (_is_address(text), "it is an IP address"),
        (":" in text, "leave out the port, which is what stands behind the colon"),
        (len(labels) == 2 and labels[0] == "*", "behind *. two labels are needed, or it would be "
         "other people's hostnames too"),
        ("*" in text, "a * is for wildcards such as *.dev.example.com, and stands in front"),
        (not text.isascii(), f"write it in its xn-- form{_xn_form(text)}"),
        (any(character.isspace() for character in text), "it has a blank in it"),
        ("" in labels, "there is a dot too many"),
        (any(len(label) > MAX_LABEL for label in labels),
         f"between two dots there are {MAX_LABEL} characters at most"),
        (len(name) > MAX_HOSTNAME, f"it has {len(name)} characters, {MAX_HOSTNAME} is the most"),
        (any(label.startswith("-") or label.endswith("-") for label in labels),
         "no part between dots begins or ends with a hyphen"),
        (labels[-1].isdigit(), "the last part is never a number"),
    )  # fmt: skip
    return next((f"; {reason}" for holds, reason in reasons if holds), "")


def _xn_form(text: str) -> str:
    """The xn-- form of a name, to be put behind a message; "" if it has none."""
    normal = normal_hostname(text)
    return f": {normal}" if valid_hostname(normal) else ""


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _idn_label_or_plain(label: str) -> bool:
    """Whether a label that starts with xn-- is the encoding of a label in another script (Punycode,
    RFC 3492); True for every other label."""
    prefix, code = label[:4].lower(), label[4:].lower()
    if prefix != "xn--":
        return True
    try:
        text = code.encode().decode("punycode")
        plain = unicodedata.normalize("NFKC", text).lower() == text and not text.isascii()
        return plain and text.encode("punycode").decode() == code
    except UnicodeError:
        return False


def valid_wildcard(name: str) -> bool:
    """Whether a name is a wildcard such as ``*.dev.example.com``. Not with one label behind the
    star, as in ``*.com``: that would be other people's hostnames."""
    rest = name.removeprefix(WILDCARD)
    return rest != name and "." in rest.removesuffix(".") and valid_hostname(rest)


def valid_open_name(name: str) -> bool:
    """Whether a name is one label and a star, such as ``quick-otter.*``."""
    label = name.removesuffix(OPEN)
    return (
        label != name
        and _LABEL.fullmatch(label) is not None
        and ("xn--" not in name.lower() or _idn_label_or_plain(label))
    )


def valid_host(text: str) -> bool:
    """Whether a text can be the Host of a request (RFC 9110 §7.2): a hostname or an IP address
    (IPv6 in brackets), with or without a port."""
    match = _HOST.fullmatch(text)
    if not match or not 1 <= int(match["port"] or 1) <= MAX_PORT:
        return False
    name = match["name"]
    if valid_hostname(name):
        return True
    try:
        ipaddress.IPv6Address(name[1:-1]) if name[0] == "[" else ipaddress.IPv4Address(name)
    except ValueError:
        return False
    return True
