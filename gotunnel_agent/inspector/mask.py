"""Hides what looks like a secret in heads, paths and bodies. Pure.

What a user sees in the inspector is shown to others as well: on a shared screen, in a screenshot,
in a HAR file beside a bug report. So secrets are masked in everything that leaves the inspector,
until the user asks for them.

What is a secret is decided by its name (SECRET_PARTS, SECRET_NAMES) or by its form (_FORMS). This
finds what is called by its name; it cannot find all. A name stays in sight, and so does the form of
a value where it helps: the scheme of Authorization, the names of cookies.

All functions take any text, also half a JSON document: bodies are often cut. Their time grows with
the length of the text and no faster: each pattern has bounds, or eats what it has looked at.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from urllib.parse import unquote_plus

MASK = "••••"  # no text of a visit is likely to have this
# What stands for a secret in a command or a program: ASCII, so that it can be sent, and found.
COPY_MASK = "***"

# A name is compared in lower case, without all that is no letter or digit: X-Api-Key, api_key and
# user[apiKey] are one. It is a secret's if it contains one of these ...
SECRET_PARTS = (
    "password",
    "passwd",
    "passphrase",
    "passcode",
    "secret",
    "token",
    "apikey",
    "authkey",
    "accesskey",
    "privatekey",
    "signingkey",
    "encryptionkey",
    "subscriptionkey",
    "authorization",
    "credential",
    "cookie",
    "sessionid",
    "sessid",
    "csrf",
    "xsrf",
    "jwt",
)
# ... or is one of these ...
SECRET_NAMES = frozenset({
    "assertion", "auth", "bearer", "cvc", "cvv", "key", "otp", "pass", "pin", "pwd", "sid", "sig",
    "xamzsignature", "xgoogsignature", "xfunctionskey",
})  # fmt: skip
# ... unless it ends with one of these: token_type and secretName are about a secret.
HARMLESS_ENDS = (
    "type", "url", "uri", "endpoint", "expiresin", "expiresat", "expiry", "count", "limit",
    "length", "supported", "required", "enabled",
)  # fmt: skip
HARMLESS_NAMES = frozenset({"accesscontrolallowcredentials"})

_NOT_PLAIN = re.compile(r"[^a-z0-9]+")
MOST_NAME = 100  # characters of a name in a body

# Secrets that are known by their form, wherever they are. Before each pattern the words of which a
# text must have one: looking for these is a hundred times as fast.
_FORMS = tuple(
    (words, re.compile(pattern, re.ASCII))
    for words, pattern in (
        (("eyJ",), r"\beyJ[\w-]{5,}(?:\.[\w-]*){1,4}"),  # JWT, JWE (RFC 7519, 7516)
        (("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"\bgh[pousr]_[A-Za-z0-9]{20,}"),
        (("github_pat_",), r"\bgithub_pat_\w{20,}"),
        (("glpat-",), r"\bglpat-[\w-]{20,}"),
        (("k_live_", "k_test_"), r"\b[srp]k_(?:live|test)_[A-Za-z0-9]{10,}"),  # Stripe
        (("whsec_",), r"\bwhsec_[A-Za-z0-9+/=]{16,}"),
        (("sk-",), r"\bsk-[\w-]{20,}"),
        (("xox",), r"\bxox[abeoprs]-[\w-]{10,}"),  # Slack
        (("npm_",), r"\bnpm_[A-Za-z0-9]{36}"),
        (("AKIA", "ASIA"), r"\bA(?:KI|SI)A[0-9A-Z]{16}\b"),  # AWS
        (("AIza",), r"\bAIza[\w-]{35}"),  # Google
        (
            ("PRIVATE KEY-----",),
            r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY-----(?s:.*?)"
            r"(?:-----END [A-Z0-9 ]{0,40}-----|\Z)",
        ),
    )
)
_BEARER = re.compile(r"\b([Bb]earer )[\w.~+/=-]{8,}", re.ASCII)
_USER_OF_URL = re.compile(r"(://[^/\s:@\"'<>]{0,100}:)[^/\s@\"'<>]{1,300}@")
# name=value, in a query or as a log line writes it.
_PAIR = re.compile(r"(?<![^?&;#\s\"'<>{,(])([^=&?;#\s\"'<>{,(]{1,100})=([^&\s\"'<>]+)")
_LINE = re.compile(r"^([ \t>-]{0,20}([\w.-]{1,100})[ \t]?:[ \t]?)(\S[^\r\n]*)", re.MULTILINE)
_KEY = re.compile(r'"((?:[^"\\\r\n]|\\.){1,100})"\s{0,20}:\s{0,20}')
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_NUMBER = re.compile(r"[-+0-9.eE]+")
_NEXT = re.compile(r'["\[\]{}]')
_PART = re.compile(
    r"(\bname=\"?([^\"\r\n;]{1,100})\"?[^\r\n]{0,1000}\r?\n(?:[^\r\n]{1,1000}\r?\n){0,20}\r?\n)"
    r"(.*?)(?=\r?\n--|\Z)",
    re.DOTALL,
)
_ELEMENT = re.compile(r"(<([A-Za-z_][\w:.-]{0,99})(?:\s[^<>]{0,200})?>)([^<]+)(?=</)")
FORM = "application/x-www-form-urlencoded"


def is_secret(name: str) -> bool:
    """Whether a field, parameter or key of that name holds a secret."""
    plain = _NOT_PLAIN.sub("", name.lower())
    if plain in SECRET_NAMES:
        return True
    if plain in HARMLESS_NAMES or plain.endswith(HARMLESS_ENDS):
        return False
    return any(part in plain for part in SECRET_PARTS)


def field(name: str, value: str) -> str:
    """The value of a field of a head."""
    plain = _NOT_PLAIN.sub("", name.lower())
    if not value:
        return value
    if plain in ("authorization", "proxyauthorization"):
        scheme, blank, _ = value.strip().partition(" ")
        return f"{scheme} {MASK}" if blank and scheme.isalpha() else MASK
    if plain == "cookie":
        return "; ".join(map(_cookie, value.split(";")))
    if plain == "setcookie":
        pair, semicolon, rest = value.partition(";")
        return _cookie(pair) + semicolon + rest
    if is_secret(name):
        return MASK
    return _by_form(_PAIR.sub(_masked_pair, value))


def _cookie(pair: str) -> str:
    name, equals, _ = pair.strip().partition("=")
    return f"{name}={MASK}" if equals else MASK


def target(text: str) -> str:
    """A request target, or any URL."""
    path, question, query = text.partition("?")
    return _by_form(path + question + _form(query))


def head(text: str) -> str:
    """A whole head, as it came: also one that breaks rules."""
    lines = text.split("\n")
    hidden = False  # the field before was, and so are lines that continue it (RFC 9112 §5.2)
    for number, line in enumerate(lines):
        bare = line.removesuffix("\r")
        end = line[len(bare) :]
        if number == 0:
            words = bare.split(" ", 2)
            lines[0] = " ".join(map(target, words)) + end
            continue
        if not bare or bare.isspace():
            continue
        if bare[:1] in (" ", "\t"):
            lines[number] = (f" {MASK}" if hidden else _text(bare)) + end
            continue
        name, colon, value = bare.partition(":")
        lead = value[: len(value) - len(value.lstrip(" \t"))]
        masked = field(name, value[len(lead) :]) if colon else _text(bare)
        hidden = colon != "" and is_secret(name)
        lines[number] = (name + colon + lead + masked if colon else masked) + end
    return "\n".join(lines)


def fields(items: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(name, field(name, value)) for name, value in items]


def body(text: str, content_type: str = "") -> str:
    """A body that is text, or looks like it. ``content_type`` is the field's value."""
    if content_type.partition(";")[0].strip().lower() == FORM:
        return _by_form(_form(text))
    return _text(text)


def body_bytes(data: bytes, content_type: str = "") -> bytes:
    """As body(), for bytes in any encoding that has ASCII in it."""
    text = body(data.decode("latin-1"), content_type)
    return text.replace(MASK, MASK.encode().decode("latin-1")).encode("latin-1")


# Parts


def _text(text: str) -> str:
    if '":' in text or '" :' in text:
        text = _json(text)
    if "form-data" in text.lower():
        text = _PART.sub(lambda m: m[1] + MASK if is_secret(m[2]) and m[3] else m[0], text)
    if "</" in text:
        text = _ELEMENT.sub(lambda m: m[1] + MASK if is_secret(m[2]) else m[0], text)
    if ":" in text:
        text = _LINE.sub(lambda m: m[1] + field(m[2], m[3]) if is_secret(m[2]) else m[0], text)
    if "=" in text:
        text = _PAIR.sub(_masked_pair, text)
    return _by_form(text)


def _by_form(text: str) -> str:
    for words, pattern in _FORMS:
        if any(word in text for word in words):
            text = pattern.sub(MASK, text)
    if "://" in text:
        text = _USER_OF_URL.sub(rf"\1{MASK}@", text)
    return _BEARER.sub(rf"\1{MASK}", text) if "earer " in text else text


def _masked_pair(match: re.Match[str]) -> str:
    return f"{match[1]}={MASK}" if is_secret(unquote_plus(match[1])) else match[0]


def _form(text: str) -> str:
    """name=value pairs with & between them, and nothing else."""
    pairs = text.split("&")
    for number, pair in enumerate(pairs):
        name, equals, value = pair.partition("=")
        if value and is_secret(unquote_plus(name)):
            pairs[number] = f"{name}{equals}{MASK}"
    return "&".join(pairs)


def _json(text: str) -> str:
    """The values behind keys of secrets, in JSON that may be cut at both ends."""
    parts, at, searched = [], 0, 0
    while match := _KEY.search(text, searched):
        searched = match.end()
        if not is_secret(_unescaped(match[1])):
            continue
        end = _end_of_value(text, searched, match[1])
        if end > searched:
            parts += [text[at:searched], f'"{MASK}"']
            at = searched = end
    return "".join(parts) + text[at:] if parts else text


def _unescaped(key: str) -> str:
    if "\\" not in key:
        return key
    try:
        return str(json.loads(f'"{key}"'))
    except ValueError:
        return key


def _end_of_value(text: str, at: int, key: str) -> int:
    """Where a secret's value ends; ``at`` if there is nothing to hide: true, null, or a number of
    tokens."""
    first = text[at : at + 1]
    if first == '"':
        match = _STRING.match(text, at)
        end = match.end() if match else at
        return at if text[at:end] == '""' else end
    if first in ("{", "["):
        depth = 0
        while match := _NEXT.search(text, at):
            at = match.end()
            if match[0] == '"':
                string = _STRING.match(text, match.start())
                at = string.end() if string else at
            else:
                depth += 1 if match[0] in "{[" else -1
                if depth == 0:
                    return at
        return len(text)
    number = _NUMBER.match(text, at)
    return number.end() if number and not key.lower().endswith("tokens") else at
