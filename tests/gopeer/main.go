// Gopeer plays the Go ends that gotunnel must understand: an agent and a
// gateway on hashicorp/yamux, with the habits of the Go program that hurt a
// careless peer, and two bare yamux ends without TLS for the multiplexer
// alone. Beside them, for measuring: a long line, and what yamux in Go does on
// the same machine. It exists for the tests and the bench; nothing here is
// meant to be run in earnest.
//
// Reading order: wire.go (what goes over a stream), agent.go, gateway.go,
// echo.go, line.go, yardstick.go. Standard output carries the lines that a test waits for, standard
// error everything else, yamux's own log included. SIGTERM and SIGINT end the
// process where it stands, as they end the Go program's agent.
package main

import (
	"flag"
	"fmt"
	"os"
	"strings"
)

const usage = `gopeer: the Go ends of the tunnel, for interoperability tests and the bench

gopeer agent -addr HOST:PORT -sni NAME -secret S -issuer I -route HOSTNAME=TARGET ...
    [-mode HOSTNAME=tcp ...] [-token-field token|auth_token] [-ca FILE | -insecure] [-retry 2s]
  An agent. Prints: registered | refused: TEXT | session ended: REASON

gopeer gateway -cert FILE -key FILE -gateway-host NAME -secret S [-ping 15s]
  A gateway on two free ports of 127.0.0.1. Prints: listening tunnel=ADDR public=ADDR, then
  registered HOSTNAME | refused: TEXT | pong | session ended: REASON

gopeer echo -listen ADDR -role server|client
  Takes one TCP connection, echoes each stream that the peer opens. Prints: listening ADDR

gopeer load -listen ADDR -role server|client -streams N -bytes B
  Takes one TCP connection, opens N streams at once, sends B bytes on each and compares the
  echo. Prints: listening ADDR, then ok N or the first error, and exits 0 or 1.

gopeer line -listen ADDR -to ADDR -oneway 25ms [-rate BYTES_PER_SECOND]
  A long line: relays TCP connections, whatever they carry, each direction that much later; only
  connecting takes no time. -rate limits each direction of each connection, with about 64 KiB in
  front of the limit. Prints: listening ADDR

gopeer yardstick [-seconds 1]
  Measures yamux in Go, client and server in this process, so many seconds a figure. Prints one
  JSON object: echo_us, open_echo_close_us, echo_beside_bulk_us (medians), stream_mb_s
`

// exitUsage is the status for arguments that make no sense, as package flag uses it.
const exitUsage = 2

func main() {
	command := ""
	if len(os.Args) > 1 {
		command = os.Args[1]
	}
	commands := map[string]func(arguments []string) error{
		"agent": runAgent, "gateway": runGateway, "echo": runEcho, "load": runLoad,
		"line": runLine, "yardstick": runYardstick,
	}
	run, known := commands[command]
	switch {
	case known:
		if err := run(os.Args[2:]); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
	case command == "-h" || command == "--help":
		fmt.Print(usage)
	default:
		fmt.Fprint(os.Stderr, usage)
		os.Exit(exitUsage)
	}
}

// newFlags is a flag set whose help is the one page above.
func newFlags(command string) *flag.FlagSet {
	flags := flag.NewFlagSet(command, flag.ExitOnError)
	flags.Usage = func() { fmt.Fprint(flags.Output(), usage) }
	return flags
}

// parse reads the arguments and ends the process if one of the needed flags is not there.
func parse(flags *flag.FlagSet, arguments []string, needed ...string) {
	flags.Parse(arguments)
	given := map[string]bool{}
	flags.Visit(func(f *flag.Flag) { given[f.Name] = true })
	for _, name := range needed {
		if !given[name] {
			fmt.Fprintf(os.Stderr, "gopeer %s: -%s is missing\n", flags.Name(), name)
			os.Exit(exitUsage)
		}
	}
	if flags.NArg() > 0 {
		fmt.Fprintf(os.Stderr, "gopeer %s: came %q, expected only flags\n", flags.Name(), flags.Arg(0))
		os.Exit(exitUsage)
	}
}

// pairs is a flag that may be repeated: -route NAME=VALUE -route NAME=VALUE.
type pairs map[string]string

func (p pairs) String() string { return fmt.Sprint(map[string]string(p)) }

func (p pairs) Set(argument string) error {
	name, value, found := strings.Cut(argument, "=")
	if !found || name == "" || value == "" {
		return fmt.Errorf("expected HOSTNAME=VALUE")
	}
	p[name] = value
	return nil
}
