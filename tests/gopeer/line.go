// A long line: a TCP relay that delivers what it reads a while later.

package main

import (
	"fmt"
	"io"
	"log"
	"net"
	"sync"
	"time"
)

const (
	// lineHolds is how many bytes may be on their way in one direction: 100 ms at 2.5 GB/s.
	lineHolds = 256 << 20

	// bufferSize is read into piece by piece, and given up for a new one when a read could
	// bring less than leastRead: large reads are cheap ones.
	bufferSize = 1 << 20
	leastRead  = 64 << 10

	// rateQueue is what waits in front of a limited line, in bytes, or what passes in lateness if
	// that is more. It is the kernel's buffer, so the sender meets its end as backpressure; where
	// the kernel gives less (rmem_max), a rate beyond 50 MB/s is not quite reached.
	rateQueue = 64 << 10

	// A limited line passes its bytes in pieces of tick, at least of a packet: smoothly. A sleep
	// may end so much late without a loss of rate.
	tick     = time.Millisecond
	packet   = 1460
	lateness = 5 * time.Millisecond
)

type buffer [bufferSize]byte

var buffers = sync.Pool{New: func() any { return new(buffer) }}

// piece is what one read brought.
type piece struct {
	data []byte
	due  time.Time // at the other end
	full *buffer   // whose last piece it is, or nil
	end  error     // instead of data: io.EOF, or that the connection broke
}

// belt holds the pieces on their way: one goroutine puts, another takes.
type belt struct {
	mutex   sync.Mutex // guards all below
	changed sync.Cond  // of mutex; never has both goroutines waiting
	pieces  []piece
	bytes   int
	gone    bool // nobody takes any more
}

// put waits while the belt is full; false means that nobody takes any more.
func (b *belt) put(p piece) bool {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	for b.bytes >= lineHolds && !b.gone {
		b.changed.Wait()
	}
	b.pieces = append(b.pieces, p)
	b.bytes += len(p.data)
	b.changed.Signal()
	return !b.gone
}

// take waits for a piece, but not until it is due.
func (b *belt) take() piece {
	b.mutex.Lock()
	defer b.mutex.Unlock()
	for len(b.pieces) == 0 {
		b.changed.Wait()
	}
	p := b.pieces[0]
	b.pieces[0] = piece{} // or its buffer would be held as long as the array
	b.pieces = b.pieces[1:]
	b.bytes -= len(p.data)
	b.changed.Signal()
	return p
}

func (b *belt) stop() {
	b.mutex.Lock()
	b.gone = true
	b.changed.Signal()
	b.mutex.Unlock()
}

// line is what all connections share.
type line struct {
	to     string
	oneway time.Duration
	rate   int // bytes per second of each direction of each connection; 0 is no limit
}

func runLine(arguments []string) error {
	var l line
	flags := newFlags("line")
	listen := flags.String("listen", "", "")
	flags.StringVar(&l.to, "to", "", "")
	flags.DurationVar(&l.oneway, "oneway", 0, "")
	flags.IntVar(&l.rate, "rate", 0, "")
	parse(flags, arguments, "listen", "to", "oneway")
	listener, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	fmt.Println("listening", listener.Addr())
	for {
		near, err := listener.Accept()
		if err != nil {
			return err
		}
		go l.connect(near.(*net.TCPConn))
	}
}

// connect dials the other end of the line, and is done when both directions are.
func (l *line) connect(near *net.TCPConn) {
	far, err := net.Dial("tcp", l.to)
	if err != nil {
		log.Printf("line: %v", err)
		cut(near)
		return
	}
	back := make(chan struct{})
	go func() {
		l.carry(far.(*net.TCPConn), near)
		close(back)
	}()
	l.carry(near, far.(*net.TCPConn))
	<-back
	near.Close()
	far.Close()
}

// carry moves one direction: its bytes, then its half-close or its RST, oneway later.
func (l *line) carry(from, to *net.TCPConn) {
	b := &belt{}
	b.changed.L = &b.mutex
	go l.load(from, b)
	for {
		p := b.take()
		time.Sleep(time.Until(p.due))
		if p.end == io.EOF {
			to.CloseWrite()
			return
		}
		if p.end != nil {
			cut(to)
			return
		}
		if _, err := to.Write(p.data); err != nil {
			b.stop()
			time.Sleep(l.oneway) // the sender hears of it as late as of anything else
			cut(from)
			return
		}
		if p.full != nil {
			buffers.Put(p.full)
		}
	}
}

// load reads until the end of from, which is put on the belt too.
func (l *line) load(from *net.TCPConn, b *belt) {
	most := bufferSize
	if l.rate > 0 {
		from.SetReadBuffer(larger(rateQueue, l.in(lateness)))
		most = larger(packet, l.in(tick))
	}
	passed := time.Now() // when the limit lets the last byte so far through
	whole := buffers.Get().(*buffer)
	rest := whole[:]
	for {
		room := len(rest)
		if room > most {
			room = most
		}
		count, err := from.Read(rest[:room])
		now := time.Now()
		if l.rate > 0 {
			if earliest := now.Add(-lateness); passed.Before(earliest) {
				passed = earliest
			}
			passed = passed.Add(time.Duration(count) * time.Second / time.Duration(l.rate))
			time.Sleep(time.Until(passed))
			if now.Before(passed) {
				now = passed
			}
		}
		p := piece{data: rest[:count], due: now.Add(l.oneway), end: err}
		rest = rest[count:]
		if len(rest) < leastRead {
			p.full = whole
			whole = buffers.Get().(*buffer)
			rest = whole[:]
		}
		if !b.put(p) || err != nil {
			return
		}
	}
}

// in is how many bytes the limit lets through in a span of time.
func (l *line) in(span time.Duration) int { return int(span.Seconds() * float64(l.rate)) }

func larger(a, b int) int {
	if a > b {
		return a
	}
	return b
}

// cut closes a connection with a RST.
func cut(conn *net.TCPConn) {
	conn.SetLinger(0)
	conn.Close()
}
