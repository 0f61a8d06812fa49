"""The gateway's command line: arguments and exit codes. run.py runs the gateway.

Exit status:

                     0                    1                         2
    (no command)     after a signal       a port cannot be opened   the configuration is wrong
    cluster-key      printed
    init             .env is written      it is not (130: Ctrl-C)   an argument is wrong
    check            nothing has failed   something has failed      the configuration is wrong
    certificates     printed, or renewal  NAME cannot be renewed    the configuration is wrong
                     of NAME requested
    token            printed              the gateway would refuse  the configuration is wrong
    agents           done                 add: NAME exists; remove: the configuration is wrong
                                          there is no NAME
    status           it serves            it drains                nothing answers
    service          done, or it runs     cannot be done, not run   the configuration is wrong

Wrong arguments, a wrong AGENTS_FILE and sockets of systemd that contradict each other give 2 as
well.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from gotunnel import NoThread, __version__
from gotunnel_agent.common.arguments import OneLineParser
from gotunnel_agent.common.examples import add_print_example
from gotunnel_agent.common.one_line import without_secrets
from gotunnel_agent.common.process import print_answer
from gotunnel_agent.common.service import ServiceError, add_arguments, run_service
from gotunnel_agent.common.show_status import add_json_option, show_answer, show_status

from .admin import certificates, check, grants, init, remote_status, service
from .admin.grants import GrantError
from .admin.init import InitError
from .agents import scope
from .agents.agents_file import AgentsFileError
from .certs.local_ca import CertificateError
from .certs.store import StoreError
from .config import Config, environment, faults, load, status_places
from .handover import Failed
from .net.inherited import Contradiction
from .net.listener import PortError
from .no_option import advice, command_advice
from .run import PROGRAM, fail, run
from .variables import ConfigError, chosen_env_file
from .visitors.log_file import LogFileError

DESCRIPTION = """\
The public half of gotunnel: terminates TLS for the hostnames that agents
register, and passes visitors' requests and connections to those agents. It is
configured by environment variables; --print-example explains each of them.
Without a command it runs until it gets a signal."""

TOKEN_EXAMPLES = """\
examples:
  gotunnel-server token --hosts app.example.com --ttl 30d
  gotunnel-server token --hosts '*.dev.example.com' --ports 2200-2299 --ttl 1y
  gotunnel-server token --hosts app.example.com --ttl 12h --issuer office"""

AGENTS_EXAMPLES = """\
examples:
  gotunnel-server agents add office --hosts 'app.example.com,*.dev.example.com'
  gotunnel-server agents add ssh --hosts ssh.example.com --ports 2200-2299
  gotunnel-server agents list
  gotunnel-server agents rotate office
  gotunnel-server agents remove office"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say; return the exit status."""
    options = parse(arguments)
    if options.command is None:
        return run(options.env_file)
    return print_answer(PROGRAM, lambda: command(options))


def command(options: argparse.Namespace) -> int:
    """Do what the options say; return the exit status."""
    try:
        if options.command == "status":  # the rest of the configuration may be wrong
            if options.url is not None:
                token = remote_status.read_token(options.token_file, environment())
                return show_answer(
                    lambda: remote_status.ask(options.url, token, options.ca_file), PROGRAM,
                    as_json=options.json,
                )  # fmt: skip
            if options.token_file is not None or options.ca_file is not None:
                raise ConfigError("--token-file and --ca-file are for a gateway that --url names")
            places = status_places(options.env_file)
            return show_status(places, PROGRAM, as_json=options.json)
        if options.command == "service":
            env_file = chosen_env_file(options.env_file)
            return run_service(options, PROGRAM, lambda chosen: service.plan(chosen, env_file))
        if options.command == "cluster-key":
            print(import_module(f"{__package__}.cluster.sealed").new_key())
            return 0
        if options.command == "init":
            return init.run_init(options, environment())
        config = load(options.env_file)
        # The operator reads the answer, not the log lines of the modules that find it.
        logging.getLogger("gotunnel").addHandler(logging.NullHandler())
        if options.command == "token":
            grants.run_token(config, hosts=options.hosts, ports=options.ports, ttl=options.ttl,
                               issuer=options.issuer, join=options.join)  # fmt: skip
            return 0
        if options.command == "agents":
            return agents(config, options)
        if options.command == "check":
            return check.run_check(config, sys.stdout)
        if options.renew is None:
            return certificates.run_certificates(config, sys.stdout)
        print(certificates.ask_renewal(config, options.renew))
        return 0
    except ConfigError as error:
        # These do not read the configuration as the gateway does.
        alone = options.command in ("status", "service", "init")
        found = [] if alone else faults(options.env_file)
        return max(fail(fault, 2) for fault in found or [str(error)])
    except (CertificateError, AgentsFileError, Contradiction) as error:
        return fail(error, 2)
    except (PortError, LogFileError, StoreError, GrantError, InitError, NoThread, Failed) as error:
        return fail(error, 1)
    except ServiceError as error:
        return max(fail(line, 1) for line in str(error).splitlines())


def agents(config: Config, options: argparse.Namespace) -> int:
    """Run a command of `agents`: add, list, remove. Raises AgentsFileError, GrantError."""
    if options.agents_command == "add":
        grants.run_agents_add(config, name=options.name, hosts=options.hosts, ports=options.ports,
                              expires=options.expires, join=options.join)  # fmt: skip
    elif options.agents_command == "rotate":
        if options.finish:
            grants.run_agents_finish(config, options.name)
        else:
            grants.run_agents_rotate(config, options.name, until=options.until, join=options.join)
    elif options.agents_command == "list":
        grants.run_agents_list(config)
    else:
        grants.run_agents_remove(config, options.name)
    return 0


class Parser(OneLineParser):
    """Names the setting that an unknown option stands for. Shows no join string or token."""

    def error(self, message: str) -> NoReturn:
        typed = self.typed if "invalid choice" in message else message.split()
        told = advice(typed, of_init="init" in self.typed) or command_advice(message) or message
        super().error(without_secrets(told))

    typed: Sequence[str] = ()  # the arguments, for a command that is the value of such an option


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the arguments; None: those of the process."""
    parser = Parser(
        PROGRAM, description=DESCRIPTION,
        usage="%(prog)s [-h] [--version] [--env-file FILE] [COMMAND]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _add_env_file(parser, default=None)
    add_print_example(parser, "gotunnel_server", "server.env", "an env file")
    parser.add_argument("--version", action="version", version=f"gotunnel {__version__}")
    commands = parser.add_subparsers(
        title="commands", prog=PROGRAM, dest="command", metavar="COMMAND"
    )
    init_ = commands.add_parser(
        "init", help="ask for what a gateway needs, and write .env",
        description="Ask for what a gateway needs, at most five things, or take it from options; "
        "write\nthe env file, look whether DNS and ports fit, and say what comes next.",
        epilog=init.EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    init.add_arguments(init_)
    check_ = commands.add_parser(
        "check", help="check whether a gateway could start here; each problem comes with a remedy",
        description="Check all that a gateway needs. Nothing is changed, nothing is ordered.",
    )  # fmt: skip
    key = commands.add_parser(
        "cluster-key", help="print a new key for several gateways that are one",
        description="Print a new key for CLUSTER_KEY_FILE, which all gateways of a cluster share.",
    )  # fmt: skip
    certificates_ = commands.add_parser(
        "certificates", help="list the certificates",
        description="List the certificates, and when they are renewed; also while a gateway runs.",
    )  # fmt: skip
    certificates_.add_argument(
        "--renew",
        metavar="NAME",
        help="have the running gateway order a new certificate for the hostname NAME",
    )
    token = commands.add_parser(
        "token", help="print a token for an agent that holds no secret",
        description="Print a token for an agent that holds no secret. It permits only HOSTS and\n"
        "PORTS. It cannot be revoked before it expires, unless its issuer is in AGENTS_FILE.",
        epilog=TOKEN_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    _add_scope(token)
    token.add_argument(
        "--ttl", required=True, type=grants.argument(grants.read_ttl), metavar="TIME",
        help="how long it is valid: 90s, 45m, 12h, 30d or 1y",
    )  # fmt: skip
    token.add_argument(
        "--issuer", metavar="NAME",
        help="the token's issuer. With a name in AGENTS_FILE, the secret there signs the token; "
        "with any other name JWT_SECRET does (default: JWT_ISSUER)",
    )  # fmt: skip
    _add_join(token)
    agents_ = commands.add_parser(
        "agents", help="write AGENTS_FILE: agents with credentials of their own",
        description="Write AGENTS_FILE, or show it. A running gateway reads it again within 5 s.",
        epilog=AGENTS_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_print_example(agents_, "gotunnel_server", "agents.yaml", "a file of agents")
    subcommands = agents_.add_subparsers(
        title="commands", dest="agents_command", metavar="COMMAND", required=True
    )
    add = subcommands.add_parser(
        "add", help="make a secret for a new agent; prints the command by which it joins",
        description="Make a secret for a new agent, write it into AGENTS_FILE, and print the lines "
        "for the agent's configuration, with the command gotunnel join that writes them.",
    )  # fmt: skip
    add.add_argument("name", metavar="NAME", type=grants.argument(grants.read_name),
                     help="the agent's name: the jwt_issuer in its configuration")  # fmt: skip
    _add_scope(add)
    add.add_argument(
        "--expires", metavar="TIME", type=grants.argument(grants.read_expires),
        help="when the secret expires: 2030-12-31 (end of that day) or 2030-12-31T18:00:00Z "
        "(default: never)",
    )  # fmt: skip
    _add_join(add)
    rotate = subcommands.add_parser(
        "rotate", help="give an agent a new secret; the old one is accepted as well for a while",
        description="Write a new secret for an agent into AGENTS_FILE, before the one that it has, "
        "and print the lines for the agent's configuration. Both are accepted until --finish, or "
        "until a date.",
    )  # fmt: skip
    rotate.add_argument("name", metavar="NAME", help="as the list shows it")
    end = rotate.add_mutually_exclusive_group()
    end.add_argument(
        "--until", metavar="TIME", type=grants.argument(grants.read_expires),
        help="until when the old secret is accepted: 2030-12-31 (the end of that day) or "
        "2030-12-31T18:00:00Z (default: until --finish)",
    )  # fmt: skip
    end.add_argument("--finish", action="store_true", help="no longer accept the old secret")
    _add_join(rotate)
    show = subcommands.add_parser(
        "list", help="list the agents, without secrets",
        description="List the agents in AGENTS_FILE and what they may claim, without secrets.",
    )  # fmt: skip
    remove = subcommands.add_parser(
        "remove", help="remove an agent; its sessions end",
        description="Remove an agent from AGENTS_FILE. A running gateway ends its sessions.",
    )  # fmt: skip
    remove.add_argument("name", metavar="NAME", help="the name, as agents list shows it")
    status = commands.add_parser(
        "status", help="show the state of the running gateway",
        description="Ask the gateway that runs here, or one elsewhere by --url, for its sessions,\n"
        "hostnames, visits and certificates. Exit status: 0 it serves, 1 it drains, 2 nothing\n"
        "answers.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_json_option(status)
    remote_status.add_arguments(status)
    service_ = commands.add_parser(
        "service", help="run the gateway as a service of systemd",
        description="Write a systemd unit for the gateway, remove it, or show its state.",
    )  # fmt: skip
    add_arguments(service_, PROGRAM, with_socket=True)
    agents_all = (agents_, add, rotate, show, remove)
    for each in (init_, check_, key, certificates_, token, *agents_all, status, service_):
        # The option may stand before the command as well: then the command must not unset it.
        _add_env_file(each, default=argparse.SUPPRESS)
    parser.typed = sys.argv[1:] if arguments is None else arguments
    return parser.parse_args(arguments)


def _add_scope(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hosts", required=True, type=grants.argument(scope.read_hosts), metavar="HOSTS",
        help="the hostnames that may be claimed, such as 'a.example.com,*.dev.example.com'",
    )  # fmt: skip
    parser.add_argument(
        "--ports", type=grants.argument(scope.read_ports), default=(), metavar="PORTS",
        help="the public ports that may be requested, such as 2200-2299,5432 (default: none)",
    )  # fmt: skip


def _add_join(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--join", action="store_true",
        help="print only the join string, as gotunnel join reads it",
    )  # fmt: skip


def _add_env_file(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--env-file", metavar="FILE", default=default,
        help="read variables from FILE (default: .env in the working folder, if there is one)",
    )  # fmt: skip
