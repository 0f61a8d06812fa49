"""Hides what looks like a secret in heads, paths and bodies. Pure.

What a user sees in the inspector is shown to others as well: on a shared screen, in a screenshot,
in a HAR file beside a bug report. So secrets are masked in everything that leaves the inspector,
until the user asks for them.

What is a secret is decided by its name (SECRET_PARTS, SECRET_WORDS, SECRET_NAMES) or by its form
(_FORMS), also in a text within a text: JSON in a string of JSON, a percent-encoded value. This
finds what is called by its name; it cannot find all. A name stays in sight, and so does the form of
a value where it helps: the scheme of Authorization, the names of cookies.

All functions take any text, also half a JSON document: bodies are often cut. Their time grows with
the length of the text and no faster: each pattern has bounds, or eats what it has looked at.
"""

from __future__ import annotations

import base64
import binascii
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
    "appkey",
    "clientkey",
    "licensekey",
    "masterkey",
    "sessionkey",
    "sharedkey",
    "webhookkey",
    "codeverifier",
    "mfacode",
    "otpcode",
    "samlresponse",
)
# ... or its last word is one of these: X-Auth, db_pass, userPin ...
SECRET_WORDS = frozenset({
    "auth", "authentication", "bearer", "hmac", "otp", "pass", "pin", "pwd", "sess", "session",
    "totp",
})  # fmt: skip
# ... or it is one of these ...
SECRET_NAMES = frozenset({
    "assertion", "cvc", "cvv", "key", "sid", "sig", "signature", "xamzsignature", "xfunctionskey",
    "xgoogsignature", "xsid",
})  # fmt: skip
# ... unless it ends with one of these: token_type and secretName are about a secret.
HARMLESS_ENDS = (
    "type", "url", "uri", "endpoint", "expiresin", "expiresat", "expiry", "count", "limit",
    "length", "supported", "required", "enabled",
)  # fmt: skip
HARMLESS_NAMES = frozenset({"accesscontrolallowcredentials"})

# An OAuth code (RFC 6749 §4.1.2) is a secret, but "code" is many other things: what is beside it
# decides.
BESIDE_CODE = ("state=", "grant_type=", "client_id=")

_NOT_PLAIN = re.compile(r"[^a-z0-9]+")
_LAST_WORD = re.compile(r"(?:[A-Z]?[a-z]+|[A-Z]+)(?=[^A-Za-z]*\Z)")
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
        (("/services/T",), r"(?<=/services/)T[A-Z0-9]{6,}/B[A-Z0-9]{6,}/\w{16,}"),  # Slack's hooks
        (("/webhooks/",), r"(?<=/webhooks/)[0-9]{10,}/[\w-]{40,}"),  # Discord's
        ((":AA",), r"\b[0-9]{6,12}:AA[\w-]{30,}"),  # Telegram's bots
        (
            ("PRIVATE KEY-----",),
            r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY-----(?s:.*?)"
            r"(?:-----END [A-Z0-9 ]{0,40}-----|\Z)",
        ),
    )
)
_BEARER = re.compile(r"\b([Bb]earer )[\w.~+/=-]{8,}", re.ASCII)
_BASIC = re.compile(r"\b([Bb]asic )([A-Za-z0-9+/]{4,}={0,2})")
_BASE64 = re.compile(r"(?<![\w+/-])eyJ[\w+/-]{8,}")  # a JSON object: {"
_USER_OF_URL = re.compile(r"(://[^/\s:@\"'<>]{0,100}:)[^/\s@\"'<>]{1,300}@")
# name=value, in a query or as a log line writes it.
_NAME = re.compile(r"(?<![^?&;#\s\"'<>{,(])([^=&?;#\s\"'<>{,(]{1,100})=(?=[^&\s\"'<>])")
_VALUE = re.compile(r"[^&\s\"'<>]+")
MOST_ENCODED = 3  # percent-encodings of a value that are undone to look for secrets
# name: "value" and name = 'value', as JavaScript, Python, GraphQL, shells and attributes of HTML
# have it, and JSON in a string of JSON: \"name\": \"value\", \"name\": 1.
_ASSIGNED = re.compile(
    r"(?<![\w.$-])([A-Za-z_$][\w.$-]{0,99})(\\{0,15})[\"'`]?\s{0,20}(?:=>|:=|[:=])\s{0,20}"
    r"(?:(\\{0,15}[\"'`])|(?=[\[{]|-?[0-9]))"
)
_UNQUOTED = re.compile(r"[\[{][^\]}]*|[-+0-9.eE]+")
_LINE = re.compile(
    r"^([ \t>-]{0,20}([\"'])?([\w.-]{1,100})(?(2)\2|)(?:[ \t]?:|[ \t]{1,20}=>?)[ \t]?)"
    r"((?(2)(?![\"'\[{0-9-]|null\b|true\b|false\b)|)\S[^\r\n]*)",
    re.MULTILINE,
)
# A text of several lines in YAML.
_BLOCK = re.compile(
    r"^([ \t-]{0,20}[\"']?([\w.-]{1,100})[\"']?[ \t]?:[ \t]{0,20}[|>][-+0-9]{0,3}[ \t]{0,20}\r?\n)"
    r"((?:[ \t]+\S[^\n]*(?:\n|\Z))+)",
    re.MULTILINE,
)
_KEY = re.compile(r'"((?:[^"\\\r\n]|\\.){1,100})"\s*:\s*')
# {"name": "password", "value": "..."} and ["password", "..."]
_NAME_VALUE = re.compile(
    r'(?:"(?:name|key|field|header)"\s*:\s*"([^"\\]{1,100})"\s*,\s*"val(?:ue)?"\s*:\s*'
    r'|\[\s*"([^"\\]{1,100})"\s*,\s*(?="(?:[^"\\]|\\.)*"\s*(?:\]|\Z)))',
    re.IGNORECASE | re.DOTALL,
)
_STRING = re.compile(
    r'(?<!\\)((\\{1,15})"([^"\\]{1,100})\2"\s{0,20}:\s{0,20})'
    r'(?:(\2")(?!\2").*?(?=(?<!\\)\2"|(?<!\\)"|\Z)|[\[{][^\]}]*|-?[0-9][0-9.eE+-]*)',
    re.DOTALL,
)
_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_NUMBER = re.compile(r"[-+0-9.eE]+")
_NEXT = re.compile(r'["\[\]{}]')
# From the beginning of a line on: a body of one long line would take for ever otherwise.
_PART = re.compile(
    r"^(content-disposition:[^\r\n]*\r?\n(?:[^\r\n]{1,1000}\r?\n){0,20}\r?\n)(.*?)(?=\r?\n--|\Z)",
    re.DOTALL | re.MULTILINE | re.IGNORECASE,
)
MOST_DISPOSITION = 1000  # characters of a part's head in which its name is looked for
_NAME_OF_PART = re.compile(r"\bname(?:\*=[\w-]{0,20}'[\w-]{0,20}')?=?[\"']?([^\"\r\n;]{1,100})")
_ELEMENT = re.compile(
    r"(<([A-Za-z_][\w:.-]{0,99})(?:\s[^<>]{0,200})?>)"
    r"(?:\s*<!\[CDATA\[.*?(?:\]\]>|\Z)|[^<]+(?=</|\Z))",
    re.DOTALL,
)
# <input name="csrf_token" value="...">
_TAG = re.compile(r"<[A-Za-z][^<>]{0,2000}")
_NAME_OF_TAG = re.compile(r"\s(?:name|key|id|property|type)\s{0,9}=\s{0,9}[\"']?([^\s\"'>]{1,100})")
_VALUE_OF_TAG = re.compile(
    r"(\s(?:value|content)\s{0,9}=\s{0,9})(?:(\"[^\"]+\"?|'[^']+'?)|[^\s\"'>]+)", re.IGNORECASE
)
FORM = "application/x-www-form-urlencoded"


def is_secret(name: str) -> bool:
    """Whether a field, parameter or key of that name holds a secret."""
    plain = _NOT_PLAIN.sub("", name.lower())
    if plain in SECRET_NAMES:
        return True
    if plain in HARMLESS_NAMES or plain.endswith(HARMLESS_ENDS):
        return False
    if any(part in plain for part in SECRET_PARTS):
        return True
    word = _LAST_WORD.search(name[-MOST_NAME:])
    return word is not None and word[0].lower() in SECRET_WORDS


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
    return _by_form(_pairs(value))


def _cookie(pair: str) -> str:
    name, equals, _ = pair.strip().partition("=")
    return f"{name}={MASK}" if equals else MASK


def target(text: str) -> str:
    """A request target, or any URL."""
    path, question, query = text.partition("?")
    begin = re.search("[;#]", path)  # /x;jsessionid=... (RFC 3986 §3.3)
    end = begin.start() if begin else len(path)
    return _by_form(path[:end] + _pairs(path[end:]) + question + _form(query))


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


def _text(text: str, encoded: bool = True) -> str:
    """``encoded``: look into percent-encoded values as well."""
    if '"' in text and (":" in text or "[" in text):
        text = _json(text)
    if "form-data" in text.lower():
        text = _PART.sub(_masked_part, text)
    if "<" in text:
        text = _ELEMENT.sub(lambda m: m[1] + MASK if is_secret(m[2]) else m[0], text)
        text = _TAG.sub(lambda m: _tag(m[0]), text)
    if ":" in text or "=" in text:
        text = _assigned(text)
        text = _BLOCK.sub(lambda m: m[1] + f"  {MASK}\n" if is_secret(m[2]) else m[0], text)
        text = _LINE.sub(lambda m: m[1] + field(m[3], m[4]) if is_secret(m[3]) else m[0], text)
    if "=" in text:
        text = _pairs(text, encoded)
    return _by_form(text)


def _masked_part(match: re.Match[str]) -> str:
    names = _NAME_OF_PART.findall(match[1][:MOST_DISPOSITION])
    return match[1] + MASK if match[2] and any(map(is_secret, names)) else match[0]


def _tag(text: str) -> str:
    names = _NAME_OF_TAG.findall(text)
    if not any(map(is_secret, names)):
        return text
    return _VALUE_OF_TAG.sub(lambda m: f'{m[1]}"{MASK}"' if m[2] else m[1] + MASK, text)


def _assigned(text: str) -> str:
    """Values in quotes, escaped or not, behind names of secrets."""
    parts, at, searched = [], 0, 0
    while match := _ASSIGNED.search(text, searched):
        searched = match.end()
        if not is_secret(match[1]):
            continue
        end, quote = searched, match[3]
        if quote:
            end = _end_of_quoted(text, searched, quote)
        elif match[2] and not match[1].lower().endswith("tokens"):
            value = _UNQUOTED.match(text, searched)
            end = value.end() if value else searched
        if end > searched:
            parts += [text[at:searched], MASK]
            at = searched = end
    return "".join(parts) + text[at:] if parts else text


def _end_of_quoted(text: str, at: int, quote: str) -> int:
    """Where that quotation mark comes next without a further backslash; else where the text ends,
    which may be cut."""
    end = at - 1
    while (end := text.find(quote, end + 1)) > at and text[end - 1] == "\\":
        pass
    return end if end >= at else len(text)


def _by_form(text: str) -> str:
    for words, pattern in _FORMS:
        if any(word in text for word in words):
            text = pattern.sub(MASK, text)
    if "eyJ" in text:
        text = _BASE64.sub(_masked_base64, text)
    if "://" in text:
        text = _USER_OF_URL.sub(rf"\1{MASK}@", text)
    if "asic " in text:
        text = _BASIC.sub(_masked_basic, text)
    return _BEARER.sub(rf"\1{MASK}", text) if "earer " in text else text


def _masked_basic(match: re.Match[str]) -> str:
    """Of a user and a password. Words behind "basic" are no base64 with a colon in it."""
    return match[1] + MASK if b":" in _from_base64(match[2]) else match[0]


def _masked_base64(match: re.Match[str]) -> str:
    plain = _from_base64(match[0]).decode("latin-1")
    return MASK if plain and _json(plain) != plain else match[0]


def _from_base64(text: str) -> bytes:
    """In either alphabet, with or without padding, also cut; b"" if it is none."""
    text = text.rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(text[: len(text) // 4 * 4] + _padded(text[len(text) // 4 * 4 :]))
    except binascii.Error:
        return b""


def _padded(rest: str) -> str:
    return rest.ljust(4, "=") if len(rest) > 1 else ""


def _pairs(text: str, encoded: bool = True) -> str:
    """name=value anywhere. ``encoded``: also a value that hides a secret in percent-encoding."""
    parts, at, searched, looked = [], 0, 0, 0
    while match := _NAME.search(text, searched):
        searched = match.end()
        hides = is_secret(unquote_plus(match[1]))
        # Pairs may be within a value, so a value is looked at once.
        if not hides and (not encoded or searched < looked):
            continue
        value = _VALUE.match(text, searched)
        end = looked = value.end() if value else searched
        if hides or _hides_secret(text[searched:end]):
            parts += [text[at:searched], MASK]
            at = searched = end
    return "".join(parts) + text[at:] if parts else text


def _hides_secret(value: str) -> bool:
    """Whether there is a secret in a value once its percent-encoding is undone."""
    for _ in range(MOST_ENCODED):
        if "%" not in value:
            return False
        plain = unquote_plus(value)
        if plain == value:
            return False
        if _text(plain, encoded=False) != plain:
            return True
        value = plain
    return False


def _form(text: str) -> str:
    """name=value pairs with & between them, and nothing else."""
    pairs = text.split("&")
    has_code = any(pair.startswith(BESIDE_CODE) for pair in pairs)
    for number, pair in enumerate(pairs):
        name, equals, value = pair.partition("=")
        if not value:
            continue
        if (
            is_secret(unquote_plus(name))
            or (has_code and name == "code")
            or ("%" in value and _hides_secret(value))
        ):
            pairs[number] = f"{name}{equals}{MASK}"
        elif "=" in value:
            pairs[number] = name + equals + _pairs(value, encoded=False)
    return "&".join(pairs)


def _json(text: str) -> str:
    """The values behind keys of secrets, in JSON that may be cut at both ends."""
    text = _behind(_NAME_VALUE, text)
    return _behind(_KEY, text)


def _behind(pattern: re.Pattern[str], text: str) -> str:
    """Mask the value behind each match whose first group that took part names a secret."""
    parts, at, searched = [], 0, 0
    while match := pattern.search(text, searched):
        searched = match.end()
        key = match[match.lastindex or 0]
        if not is_secret(_unescaped(key)):
            continue
        end = _end_of_value(text, searched, key)
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
