"""A target on Flask's development server, for test_real_programs.py. It prints its address."""

import hashlib

import flask

PIECE = 1024 * 1024  # bytes that are read of an upload at a time

site = flask.Flask(__name__)
site.secret_key = "only for tests"


@site.post("/login")
def login():
    flask.session["name"] = flask.request.form["name"]
    return flask.redirect("/name")


@site.get("/name")
def name():
    return flask.session.get("name", "nobody")


@site.get("/numbers")
def numbers():
    """Of unknown length: Flask sends it in chunks."""
    return flask.Response((f"{number}\n" for number in range(1000)), mimetype="text/plain")


@site.post("/digest")
def digest():
    sha256 = hashlib.sha256()
    while piece := flask.request.stream.read(PIECE):
        sha256.update(piece)
    return sha256.hexdigest()


site.run("127.0.0.1", 0)
