// A target on Node's own http server, for test_real_programs.py. Prints its port, then serves:
//
//   GET  /counter    how many requests this connection has brought
//   GET  /chunks     a thousand chunks; /trailers: a field behind the last one
//   GET  /events     an event stream; what is POSTed to /events is its next event
//   POST /digest     SHA-256 of the body
//   POST /refused    413 to "Expect: 100-continue", before any of the body
//   GET  /parts      a page of 50 images and 50 scripts; each adds 1 to its count when it is there

"use strict";
const crypto = require("crypto");
const http = require("http");

const HALF = 50;
const listeners = new Set();
const counters = new WeakMap(); // of connections

const PAGE = `<!doctype html>
<title>parts</title>
<p id="count">0</p>
<script>
  function count() {
    const field = document.getElementById("count");
    field.textContent = Number(field.textContent) + 1;
  }
</script>
<script>
  for (let number = 0; number < ${HALF}; number++) {
    document.write('<img onload="count()" src="/image/' + number + '">');
    document.write('<script src="/script/' + number + '"></' + 'script>');
  }
</script>
`;
const IMAGE = '<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>';

function answer(response, type, body) {
  response.writeHead(200, { "Content-Type": type, "Content-Length": Buffer.byteLength(body) });
  response.end(body);
}

function digest(request, response) {
  const hash = crypto.createHash("sha256");
  request.on("data", (data) => hash.update(data));
  request.on("end", () => answer(response, "text/plain", hash.digest("hex")));
}

function chunks(response) {
  for (let number = 0; number < 1000; number++) response.write(`${number},`);
  response.end();
}

function trailers(response) {
  response.writeHead(200, { Trailer: "X-Count" });
  response.write("body");
  response.addTrailers({ "X-Count": "4" });
  response.end();
}

function events(request, response) {
  response.writeHead(200, { "Content-Type": "text/event-stream" });
  response.write(": open\n\n");
  listeners.add(response);
  request.on("close", () => listeners.delete(response));
}

function say(request, response) {
  let event = "";
  request.setEncoding("utf8");
  request.on("data", (data) => (event += data));
  request.on("end", () => {
    for (const listener of listeners) listener.write(`data: ${event}\n\n`);
    answer(response, "text/plain", String(listeners.size));
  });
}

const server = http.createServer((request, response) => {
  const count = (counters.get(request.socket) || 0) + 1;
  counters.set(request.socket, count);
  const part = request.url.match(/^\/(image|script)\/\d+$/);
  if (part && part[1] === "image") answer(response, "image/svg+xml", IMAGE);
  else if (part) answer(response, "text/javascript", "count();");
  else if (request.url === "/parts") answer(response, "text/html", PAGE);
  else if (request.url === "/counter") answer(response, "text/plain", String(count));
  else if (request.url === "/chunks") chunks(response);
  else if (request.url === "/trailers") trailers(response);
  else if (request.url === "/events" && request.method === "POST") say(request, response);
  else if (request.url === "/events") events(request, response);
  else if (request.url === "/digest") digest(request, response);
  else response.writeHead(404).end();
});

server.on("checkContinue", (request, response) => {
  if (request.url === "/refused") {
    response.writeHead(413, { "Content-Length": 9, Connection: "close" }).end("too large");
  } else {
    response.writeContinue();
    server.emit("request", request, response);
  }
});

server.listen(0, "127.0.0.1", () => console.log(`listening on ${server.address().port}`));
