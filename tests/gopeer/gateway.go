// The gateway: agents on one port, visitors on another, both with TLS.

package main

import (
	"bufio"
	"crypto/tls"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"sort"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
)

const (
	pingEvery    = 15 * time.Second
	pongDeadline = 20 * time.Second
	// handshakeTimeout keeps a silent visitor from holding a goroutine for ever.
	handshakeTimeout = 10 * time.Second
)

type gateway struct {
	host   string // the only SNI that agents may dial
	secret string
	ping   time.Duration
	goAway time.Duration // after the ack; 0: never

	mutex   sync.Mutex         // guards tunnels
	tunnels map[string]*tunnel // by hostname, lower case
}

type tunnel struct {
	session *yamux.Session
	modes   map[string]string
}

func runGateway(arguments []string) error {
	g := &gateway{tunnels: map[string]*tunnel{}}
	flags := newFlags("gateway")
	cert := flags.String("cert", "", "")
	key := flags.String("key", "", "")
	flags.StringVar(&g.host, "gateway-host", "", "")
	flags.StringVar(&g.secret, "secret", "", "")
	flags.DurationVar(&g.ping, "ping", pingEvery, "")
	flags.DurationVar(&g.goAway, "go-away", 0, "")
	parse(flags, arguments, "cert", "key", "gateway-host", "secret")

	pair, err := tls.LoadX509KeyPair(*cert, *key)
	if err != nil {
		return err
	}
	agents, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	visitors, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Printf("listening tunnel=%s public=%s\n", agents.Addr(), visitors.Addr())

	agentTLS := &tls.Config{Certificates: []tls.Certificate{pair}, GetConfigForClient: g.checkSNI}
	visitorTLS := &tls.Config{Certificates: []tls.Certificate{pair}, NextProtos: []string{"http/1.1"}}
	go acceptEach(agents, agentTLS, g.serveAgent)

	requests := handedOver{visitors, make(chan net.Conn)}
	go http.Serve(requests, g)
	return acceptEach(visitors, visitorTLS, func(conn *tls.Conn) {
		name := conn.ConnectionState().ServerName
		if tunnel, mode := g.find(name); mode == "tcp" {
			relayVisitor(conn, tunnel, name)
		} else {
			requests.conns <- conn
		}
	})
}

// acceptEach gives every connection that came through its handshake to serve,
// in a goroutine of its own, until the listener fails.
func acceptEach(listener net.Listener, config *tls.Config, serve func(*tls.Conn)) error {
	for {
		raw, err := listener.Accept()
		if err != nil {
			return err
		}
		go func() {
			conn := tls.Server(raw, config)
			conn.SetDeadline(time.Now().Add(handshakeTimeout))
			if err := conn.Handshake(); err != nil {
				log.Printf("handshake: %v", err)
				raw.Close()
				return
			}
			conn.SetDeadline(time.Time{})
			serve(conn)
		}()
	}
}

// handedOver is a listener whose connections were accepted, and found to be http, elsewhere.
type handedOver struct {
	net.Listener
	conns chan net.Conn
}

func (h handedOver) Accept() (net.Conn, error) { return <-h.conns, nil }

// Agents.

// checkSNI lets agents in that dial the gateway by its own name, and no other.
func (g *gateway) checkSNI(hello *tls.ClientHelloInfo) (*tls.Config, error) {
	if hello.ServerName != g.host {
		return nil, fmt.Errorf("SNI %q, expected %q", hello.ServerName, g.host)
	}
	return nil, nil // the listener's own configuration
}

func (g *gateway) serveAgent(conn *tls.Conn) {
	session, err := yamux.Server(conn, nil)
	if err != nil {
		log.Print(err)
		return
	}
	defer session.Close()
	control, err := session.Accept()
	if err != nil {
		log.Printf("no control stream: %v", err)
		return
	}
	var message register
	if err := receive(control, &message); err != nil || message.Type != "register" {
		log.Printf("came %q, expected register: %v", message.Type, err)
		return
	}
	agent := &tunnel{session, message.Modes}
	if refusal := g.claim(message, agent); refusal != "" {
		fmt.Println("refused:", refusal)
		send(control, ack{Type: "ack", Error: refusal})
		return
	}
	defer g.release(agent)
	if err := send(control, ack{Type: "ack", OK: true}); err != nil {
		log.Printf("ack: %v", err)
		return
	}
	for _, hostname := range sortedNames(message.Routes) {
		fmt.Println("registered", hostname)
	}
	if g.goAway > 0 {
		time.AfterFunc(g.goAway, func() {
			session.GoAway()
			fmt.Println("sent GoAway(0)")
		})
	}
	fmt.Println("session ended:", g.heartbeats(control))
}

// heartbeats pings the agent until it answers wrongly or not at all. Nobody
// looks at the session in between: one that is dead, or whose control stream
// has ended, keeps its hostnames until the next tick.
func (g *gateway) heartbeats(control net.Conn) error {
	ticker := time.NewTicker(g.ping)
	defer ticker.Stop()
	for range ticker.C {
		if err := send(control, newHeartbeat("ping")); err != nil {
			return fmt.Errorf("ping: %w", err)
		}
		control.SetReadDeadline(time.Now().Add(pongDeadline))
		var answer heartbeat
		if err := receive(control, &answer); err != nil {
			return fmt.Errorf("pong: %w", err)
		}
		if answer.Type != "pong" {
			return fmt.Errorf("came %q, expected pong", answer.Type)
		}
		fmt.Println("pong")
	}
	return nil
}

// claim gives the agent all the hostnames it asks for or none; then it returns the refusal.
func (g *gateway) claim(message register, agent *tunnel) (refusal string) {
	token := message.Token
	if token == "" {
		token = message.AuthToken
	}
	if err := checkToken(g.secret, token); err != nil {
		log.Print(err)
		return "auth failed"
	}
	if len(message.Routes) == 0 {
		return "no routes"
	}
	g.mutex.Lock()
	defer g.mutex.Unlock()
	for _, hostname := range sortedNames(message.Routes) {
		if g.tunnels[strings.ToLower(hostname)] != nil {
			return "host already registered: " + hostname
		}
	}
	for hostname := range message.Routes {
		g.tunnels[strings.ToLower(hostname)] = agent
	}
	return ""
}

func (g *gateway) release(agent *tunnel) {
	g.mutex.Lock()
	defer g.mutex.Unlock()
	for hostname, owner := range g.tunnels {
		if owner == agent {
			delete(g.tunnels, hostname)
		}
	}
}

// find looks up a hostname as a visitor spelled it, in any case and with or
// without a port. The tunnel is nil if no agent has registered it.
func (g *gateway) find(name string) (owner *tunnel, mode string) {
	if hostname, _, err := net.SplitHostPort(name); err == nil {
		name = hostname
	}
	g.mutex.Lock()
	defer g.mutex.Unlock()
	owner = g.tunnels[strings.ToLower(name)]
	if owner == nil {
		return nil, ""
	}
	for hostname, mode := range owner.modes {
		if strings.EqualFold(hostname, name) {
			return owner, mode
		}
	}
	return owner, "http"
}

func sortedNames(routes map[string]string) []string {
	names := make([]string, 0, len(routes))
	for name := range routes {
		names = append(names, name)
	}
	sort.Strings(names)
	return names
}

// Visitors.

// ServeHTTP carries one request over one stream: first the whole request, then
// the answer, then FIN. An answer that breaks off in the middle of its chunks
// is ended for the visitor as if it were whole.
func (g *gateway) ServeHTTP(visitor http.ResponseWriter, request *http.Request) {
	owner, _ := g.find(request.Host)
	if owner == nil {
		http.Error(visitor, "no tunnel for "+request.Host, http.StatusBadGateway)
		return
	}
	stream, err := owner.session.Open()
	if err != nil {
		http.Error(visitor, err.Error(), http.StatusBadGateway)
		return
	}
	defer stream.Close()
	answer, err := roundTrip(stream, request)
	if err != nil {
		http.Error(visitor, err.Error(), http.StatusBadGateway)
		return
	}
	defer answer.Body.Close()
	for name, values := range answer.Header {
		visitor.Header()[name] = values
	}
	visitor.WriteHeader(answer.StatusCode)
	if _, err := io.Copy(visitor, answer.Body); err != nil {
		log.Printf("answer: %v", err)
	}
}

func roundTrip(stream net.Conn, request *http.Request) (*http.Response, error) {
	if err := writeDataHeader(stream, request.Host); err != nil { // port included, if there is one
		return nil, err
	}
	if err := request.Write(stream); err != nil {
		return nil, err
	}
	return http.ReadResponse(bufio.NewReader(stream), request)
}

// relayVisitor joins a visitor of a tcp hostname and a stream from the first
// byte. Each end's EOF is passed on by itself: as FIN to the agent, as TLS
// close_notify to the visitor.
func relayVisitor(visitor *tls.Conn, owner *tunnel, hostname string) {
	defer visitor.Close()
	stream, err := owner.session.Open()
	if err != nil {
		log.Print(err)
		return
	}
	defer stream.Close()
	if err := writeDataHeader(stream, hostname); err != nil {
		log.Print(err)
		return
	}
	sent := make(chan struct{})
	go func() {
		io.Copy(stream, visitor)
		stream.Close() // a FIN: yamux still reads the other way
		close(sent)
	}()
	io.Copy(visitor, stream)
	visitor.CloseWrite()
	<-sent
}
