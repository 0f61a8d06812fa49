"""`gotunnel-server certificates`: the table, and the requests to renew."""

import base64
import io
import os
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from fake_ca import DAY, NOW
from operators import APP, URL, config_of, ordering, put_pair, run, tree
from support import gateway_environment

from gotunnel_server.admin import certificates
from gotunnel_server.admin.certificates import GO, LOCAL, ORDERED, OWN, Row
from gotunnel_server.certs.folder import open_store
from gotunnel_server.certs.local_ca import Authority
from gotunnel_server.certs.schedule import renew_at
from gotunnel_server.certs.store import StoreError, ca_id

# Certificates


def test_rows_say_where_certificates_are_from_and_when_they_are_renewed(tmp_path, store, mint):
    now = time.time()
    stored = store.save(APP, *mint.pair(APP, now))
    store.save_state("sad.example.com", {"failures": 2, "next_attempt_at": now + 600,
                                         "error": "dns: no address"})  # fmt: skip
    key, chain = mint.pair("left.example.com", now)
    (tmp_path / "left.example.com").write_bytes(key + chain)
    (tmp_path / "acme_account+key").write_bytes(key)
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    put_pair(pairs, "own", mint.pair("*.example.org", now))
    put_pair(pairs, "broken", (b"no key", chain))
    before = tree(tmp_path)
    rows = certificates.find_rows(ordering(tmp_path, CERT_DIR=str(pairs)))
    assert tree(tmp_path) == before
    assert [(row.name, row.source) for row in rows] == [
        ("*.example.org", OWN), ("-", OWN), (APP, ORDERED), ("left.example.com", GO),
        ("sad.example.com", ORDERED)]  # fmt: skip
    _, broken, app, left, sad = rows
    assert app.issuer == left.issuer == "fake CA" and app.error == ""
    assert app.renew_at == renew_at(APP, stored.begins_at, stored.ends_at)
    assert (sad.ends_at, sad.renew_at, sad.error) == (None, now + 600, "dns: no address")
    assert "not a private key" in broken.error


def test_a_broken_certificate_is_named_and_stays_where_it_is(tmp_path, store, mint):
    file = tmp_path / store.save(APP, *mint.pair(APP)).key
    file.write_bytes(b"garbage")
    store.save_state(APP, {"failures": 0})
    (row,) = certificates.find_rows(ordering(tmp_path))
    assert row.ends_at is None and "expected a private key" in row.error
    assert file.read_bytes() == b"garbage"


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 50_000])
def test_a_state_that_makes_no_sense_is_none(tmp_path, store, mint, content):
    file = tmp_path / store.save(APP, *mint.pair(APP, time.time())).key
    file.with_suffix(".json").write_bytes(content)
    (row,) = certificates.find_rows(ordering(tmp_path))
    assert row.error == "" and row.ends_at is not None


def test_local_certificates_are_listed_without_the_ca_itself(tmp_path):
    Authority(tmp_path / "local").issue("app.localhost")
    (tmp_path / "local" / "bad.localhost.crt").write_bytes(b"garbage")
    bad, good = sorted(certificates.find_rows(config_of(tmp_path)), key=lambda row: row.error == "")
    assert (good.name, good.source) == ("app.localhost", LOCAL)
    assert good.ends_at - good.renew_at == 30 * DAY
    assert bad.name == "bad.localhost" and "cannot be read" in bad.error


def test_where_there_is_no_certificate_a_sentence_says_so(tmp_path):
    out = io.StringIO()
    assert certificates.run_certificates(ordering(tmp_path), out) == 0
    assert out.getvalue().startswith(f"There is no certificate yet in {tmp_path}; a gateway")
    assert out.getvalue().count("\n") == 1


def test_table_is_aligned_and_tells_each_last_error_in_full():
    rows = [
        Row("a.test", OWN, "R", NOW + 3.5 * DAY),
        Row("long.example.com", ORDERED, "", NOW - 1, NOW - 1, "dns:\n no address"),
    ]
    assert certificates.table(rows, NOW).splitlines() == [
        "NAME              FROM      ISSUER  DAYS LEFT  NEXT RENEWAL (UTC)",
        "a.test            CERT_DIR  R       3          -",
        "long.example.com  ACME      -       expired    due",
        "    last error: dns: no address",
    ]


# Renewals that are asked for


def test_renewals_are_taken_once(tmp_path, store):
    assert store.renewals() == []
    for name in (APP, "b.example.com", APP):
        store.ask_renewal(name)
    other = open_store(tmp_path, URL + "2")
    assert other.renewals() == []
    assert open_store(tmp_path, URL).renewals() == [APP, "b.example.com"]
    assert store.renewals() == []


LONG = ".".join(["l" * 60] * 3 + ["n" * 40, "example"])  # longer than a file's name may be


@pytest.mark.parametrize("content", ["", "../x", "b.example.com", "a\nb", "\0"])
def test_a_request_of_somebody_elses_making_is_for_its_files_name(tmp_path, store, content):
    store.ask_renewal(APP)
    [file] = tmp_path.rglob("*.renew")
    file.write_text(content)
    assert store.renewals() == [APP]


def test_a_long_hostname_can_be_asked_for(tmp_path, store):
    store.ask_renewal(LONG)
    assert store.renewals() == [LONG]


@pytest.mark.parametrize("name", ["../x", ""])
def test_a_name_that_is_no_file_cannot_be_asked_for(tmp_path, store, name):
    with pytest.raises((ValueError, StoreError)):
        store.ask_renewal(name)
    assert store.renewals() == []


def test_long_hostname_is_shown_as_it_is(tmp_path, store, mint):
    name = LONG
    store.save(name, *mint.pair(name, time.time()))
    store.save_state(name, {"error": "the CA was away"})
    [row] = certificates.find_rows(ordering(tmp_path))
    assert (row.name, row.issuer, row.error) == (name, "fake CA", "the CA was away")
    (tmp_path / store.certificate(name).key).unlink()
    assert (
        certificates.find_rows(ordering(tmp_path)) == []
    )  # a hashed key does not tell its hostname


def test_no_folder_is_made_to_ask_for_a_renewal(tmp_path, mint):
    (tmp_path / "left.example.com").write_bytes(b"".join(mint.pair("left.example.com")))
    with pytest.raises(StoreError, match="start the gateway once"):
        certificates.ask_renewal(ordering(tmp_path), "left.example.com")
    assert not (tmp_path / ca_id(URL)).exists()


def test_a_certificate_that_nobody_ordered_cannot_be_renewed(tmp_path):
    Authority(tmp_path / "local").issue("app.localhost")
    with pytest.raises(StoreError, match="is from local CA"):
        certificates.ask_renewal(config_of(tmp_path), "app.localhost")


def test_a_local_certificate_with_an_odd_name_or_no_end_is_a_row(tmp_path):
    (tmp_path / "device.crt").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "fifo.crt")
    rows = {row.name: row for row in certificates.local_rows(tmp_path)}
    assert all("cannot be read" in rows[name].error for name in ("device", "fifo"))


def test_certificates_and_renew_as_programs(tmp_path, store, mint):
    environment = gateway_environment(tmp_path, ACME_ENV="", ACME_DIRECTORY=URL)
    store.save(APP, *mint.pair(APP, time.time()))
    status, out, errors = run("certificates", **environment)
    assert (status, errors) == (0, "")
    assert out.splitlines()[1].startswith(f"{APP}  ACME  fake CA  89")
    status, out, errors = run("certificates", "--renew", f"{APP}.", **environment)
    assert (status, errors) == (0, "") and out.startswith(f"{APP}: ")
    assert store.renewals() == [APP]
    status, out, errors = run("certificates", "--renew", "other.example.com", **environment)
    assert status == 1 and out == "" and errors.count("\n") == 1 and "other.example.com" in errors
    assert store.renewals() == []


def test_what_waits_is_shown_with_the_reason_and_links_are_whole(tmp_path, store):
    link, now = f"https://portal.letsencrypt.org/sfe/v1/unpause?jwt={'x' * 900}", time.time()
    store.save_state("bad.example.com", {"error": f"visit {link}", "next_attempt_at": now + 9000})
    store.save_state("waits.example.com", {"turn_at": now + 9000, "turn_why": "more than 45"})
    store.save_turns({"held": {"example.org": [now + 7200, "too many certificates (50)"]}})
    out = io.StringIO()
    certificates.run_certificates(ordering(tmp_path), out)
    _, bad, error, waits, why, domain = out.getvalue().splitlines()
    assert error == f"    last error: visit {link}" and why == (
        "    it waits for its turn: more than 45")  # fmt: skip
    assert waits.split()[-2] == time.strftime("%Y-%m-%d", time.gmtime(now + 9000))
    assert domain.startswith("New hostnames of example.org wait until 20")


def test_a_certificate_whose_issuer_makes_no_sense_is_a_row(tmp_path):
    leaf = Authority(tmp_path / "authority").issue("a.test")[0]
    der = x509.load_pem_x509_certificate(leaf.read_bytes()).public_bytes(serialization.Encoding.DER)
    at = der.index(b"\x0c", der.index(bytes.fromhex("550403"))) + 2  # of the issuer's name, UTF-8
    der = der[:at] + b"\xff" + der[at + 1 :]
    pem = base64.encodebytes(der)
    (tmp_path / "odd.crt").write_bytes(
        b"-----BEGIN CERTIFICATE-----\n" + pem + b"-----END CERTIFICATE-----\n"
    )
    (row,) = certificates.local_rows(tmp_path)
    assert "cannot be read" in row.error
