// The agent: dial, register, serve streams until the session ends, wait, again.

package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"time"

	"github.com/hashicorp/yamux"
)

// retryAfter is the pause of the Go program's agent. It never grows, and no
// refusal ends it.
const retryAfter = 2 * time.Second

type agent struct {
	addr       string
	tls        *tls.Config
	secret     string
	issuer     string
	tokenField string
	routes     pairs // hostname, spelled as registered, to target
	modes      pairs
}

func runAgent(arguments []string) error {
	a := agent{routes: pairs{}, modes: pairs{}, tls: &tls.Config{}}
	flags := newFlags("agent")
	flags.StringVar(&a.addr, "addr", "", "")
	flags.StringVar(&a.tls.ServerName, "sni", "", "")
	flags.StringVar(&a.secret, "secret", "", "")
	flags.StringVar(&a.issuer, "issuer", "", "")
	flags.StringVar(&a.tokenField, "token-field", "token", "")
	flags.Var(a.routes, "route", "")
	flags.Var(a.modes, "mode", "")
	flags.BoolVar(&a.tls.InsecureSkipVerify, "insecure", false, "")
	ca := flags.String("ca", "", "")
	retry := flags.Duration("retry", retryAfter, "")
	parse(flags, arguments, "addr", "sni", "secret", "issuer")
	if a.tokenField != "token" && a.tokenField != "auth_token" {
		return fmt.Errorf("-token-field is %q, expected token or auth_token", a.tokenField)
	}
	if *ca != "" {
		pem, err := os.ReadFile(*ca)
		if err != nil {
			return err
		}
		a.tls.RootCAs = x509.NewCertPool()
		if !a.tls.RootCAs.AppendCertsFromPEM(pem) {
			return fmt.Errorf("%s holds no certificate", *ca)
		}
	}
	for {
		if err := a.serveOnce(); err != nil {
			log.Print(err)
		}
		time.Sleep(*retry)
	}
}

// serveOnce lives one session. The error is why there was none; how a session
// ended is printed.
func (a *agent) serveOnce() error {
	conn, err := tls.Dial("tcp", a.addr, a.tls)
	if err != nil {
		return err
	}
	session, err := yamux.Client(conn, nil)
	if err != nil {
		return err
	}
	defer session.Close()
	control, err := session.Open()
	if err != nil {
		return err
	}
	answer, err := a.register(control)
	if err != nil {
		return fmt.Errorf("no ack: %w", err)
	}
	if !answer.OK {
		fmt.Println("refused:", answer.Error)
		return nil
	}
	fmt.Println("registered")

	ended := make(chan error, 2) // room for both loops, so that neither waits for a reader
	go func() { ended <- answerPings(control) }()
	go func() { ended <- a.acceptStreams(session) }()
	fmt.Println("session ended:", <-ended)
	return nil
}

func (a *agent) register(control net.Conn) (answer ack, err error) {
	message := register{Type: "register", Routes: a.routes, Modes: a.modes}
	token, err := makeToken(a.secret, a.issuer)
	if err != nil {
		return answer, err
	}
	if a.tokenField == "token" {
		message.Token = token
	} else {
		message.AuthToken = token
	}
	if err := send(control, message); err != nil {
		return answer, err
	}
	err = receive(control, &answer)
	return answer, err
}

func answerPings(control net.Conn) error {
	for {
		var message heartbeat
		if err := receive(control, &message); err != nil {
			return fmt.Errorf("control stream: %w", err)
		}
		if message.Type == "ping" {
			if err := send(control, newHeartbeat("pong")); err != nil {
				return fmt.Errorf("control stream: %w", err)
			}
		}
	}
}

// acceptStreams runs until the session is dead. GoAway(0) does not end it: a
// gateway that wants the agent elsewhere has to close the session.
func (a *agent) acceptStreams(session *yamux.Session) error {
	for {
		stream, err := session.Accept()
		if err != nil {
			return err
		}
		go func() {
			if err := a.relay(stream); err != nil {
				log.Print(err)
			}
		}()
	}
}

// relay joins a data stream and its target, in both modes byte for byte. The
// first direction to end takes the other one with it: a FIN from the gateway
// closes the target, whatever it was about to answer. What the target does,
// end or reset, becomes a FIN.
func (a *agent) relay(stream net.Conn) error {
	defer stream.Close()
	hostname, err := readDataHeader(stream)
	if err != nil {
		return err
	}
	address, known := a.routes[hostname] // as it stands: no case folded, no port cut off
	if !known {
		return fmt.Errorf("no route for %q", hostname)
	}
	target, err := net.Dial("tcp", address) // no deadline, like the Go program
	if err != nil {
		return err
	}
	defer target.Close()
	ended := make(chan struct{}, 2) // room for both, so that the later one does not wait
	oneWay := func(to, from net.Conn) {
		io.Copy(to, from)
		ended <- struct{}{}
	}
	go oneWay(target, stream)
	go oneWay(stream, target)
	<-ended
	return nil
}
