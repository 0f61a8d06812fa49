"""The web site behind the demo's tunnel: one page, which shows the request that asked for it.

    python3 tools/demo_site.py TOKEN

TOKEN stands in the page, so a visitor that finds it knows that the page came from this process.
"""

import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PAGE = """\
A web site that listens on {address} alone, seen through a tunnel.
Token: {token}

It was asked:

{request}
{headers}"""


class Page(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        page = PAGE.format(
            address="{}:{}".format(*self.server.server_address),
            token=self.server.token,
            request=self.requestline,
            headers=self.headers,
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)


def main(token):
    site = ThreadingHTTPServer(("127.0.0.1", 0), Page)
    site.token = token
    print("site: http://{}:{}/".format(*site.server_address), file=sys.stderr, flush=True)
    site.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1])
