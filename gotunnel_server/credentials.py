"""From a token to who its bearer is (RFC 7519).

One secret, shared with all agents, signs the tokens: HS256 and nothing else, so that a token
cannot choose how it is checked. It must say when it ends (``exp``).
"""

import warnings
from typing import NamedTuple

import jwt

from gotunnel import TokenInvalid

CLOCK_LEEWAY = 60  # seconds that an agent's clock may be off; few small hosts keep better time


# Secrets of less than 32 bytes are in use with Go gateways; at start we say so ourselves, once.
warnings.filterwarnings("ignore", message="The HMAC key is")


class Identity(NamedTuple):
    """Who a token speaks for: its issuer, "" if it names none."""

    issuer: str


class Credentials:
    """Checks tokens. Any thread."""

    def __init__(self, secret, issuer=None):
        """``issuer``: the ``iss`` that a token must have; None permits any."""
        self._secret = secret
        self._issuer = issuer

    def identify(self, token: str) -> Identity:
        """Whom the token speaks for; raises TokenInvalid, with the reason, if for nobody."""
        try:
            claims = jwt.decode(
                token,
                self._secret,
                algorithms=["HS256"],
                issuer=self._issuer,
                leeway=CLOCK_LEEWAY,
                # An audience is not ours to judge: Go agents send none, and ours neither.
                options={"require": ["exp"], "verify_aud": False},
            )
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError) as error:
            # The last three: what a stranger puts into a token can be odder than PyJWT expects.
            raise TokenInvalid(str(error)) from None
        issuer = claims.get("iss", "")
        return Identity(issuer if isinstance(issuer, str) else "")
