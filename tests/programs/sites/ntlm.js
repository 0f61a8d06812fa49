// A site that one has to sign in to by NTLM, as a module of npm does it: any password will do.
const [port] = process.argv.slice(2);
const express = require("express");
const ntlm = require("express-ntlm");

const site = express();
site.use(ntlm());
site.use(express.text({ type: () => true }));
site.all("*", (request, response) => {
  response.send(`${request.ntlm.UserName} ${request.method} ${request.socket.remotePort} ` +
    `${typeof request.body === "string" ? request.body : ""}\n`);
});
site.listen(Number(port), "127.0.0.1", () => console.log("listening"));
