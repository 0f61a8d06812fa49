// The yardstick: what yamux in Go does on this machine at this moment.

package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"sort"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
)

const (
	// The first byte of a stream says what its acceptor does: send all back, or only count.
	echoes, counts = 'e', 'c'

	messageSize = 64       // bytes of an echo
	writeSize   = 64 << 10 // bytes of a write, where there are many
	bulkStreams = 4
	settling    = 100 * time.Millisecond // before a figure of bulk: windows and buffers are full then
)

// figures is the line that is printed; the echoes are medians.
type figures struct {
	Echo           float64 `json:"echo_us"`
	OpenEchoClose  float64 `json:"open_echo_close_us"`
	EchoBesideBulk float64 `json:"echo_beside_bulk_us"`
	Stream         float64 `json:"stream_mb_s"`
}

// yardstick is a session whose two ends are in this process. opener writes,
// what the other end counts ends up in came.
type yardstick struct {
	opener *yamux.Session
	came   atomic.Int64
	span   time.Duration // of each figure
}

func runYardstick(arguments []string) error {
	flags := newFlags("yardstick")
	seconds := flags.Float64("seconds", 1, "")
	parse(flags, arguments)
	y := &yardstick{span: time.Duration(*seconds * float64(time.Second))}
	accepter, err := y.start()
	if err != nil {
		return err
	}
	defer accepter.Close()
	defer y.opener.Close()
	go y.accept(accepter)

	var f figures
	for _, measure := range []struct {
		figure *float64
		by     func() (float64, error)
	}{
		{&f.Echo, y.echo},
		{&f.OpenEchoClose, y.openEchoClose},
		{&f.EchoBesideBulk, y.echoBesideBulk},
		{&f.Stream, y.stream},
	} {
		if *measure.figure, err = measure.by(); err != nil {
			return err
		}
	}
	return json.NewEncoder(os.Stdout).Encode(f)
}

// start joins a client and a server over loopback; the client opens.
func (y *yardstick) start() (accepter *yamux.Session, err error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	near, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		return nil, err
	}
	far, err := listener.Accept()
	if err != nil {
		return nil, err
	}
	config := yamux.DefaultConfig()
	config.LogOutput = io.Discard
	if y.opener, err = yamux.Client(near, config); err != nil {
		return nil, err
	}
	return yamux.Server(far, config)
}

func (y *yardstick) accept(session *yamux.Session) {
	for {
		stream, err := session.Accept()
		if err != nil {
			return // the end of it all
		}
		go func() {
			defer stream.Close()
			buffer := make([]byte, writeSize)
			if _, err := io.ReadFull(stream, buffer[:1]); err != nil {
				return
			}
			kind := buffer[0]
			for {
				count, err := stream.Read(buffer)
				if err != nil {
					return
				}
				if kind == counts {
					y.came.Add(int64(count))
				} else if _, err = stream.Write(buffer[:count]); err != nil {
					return
				}
			}
		}()
	}
}

func (y *yardstick) open(kind byte) (net.Conn, error) {
	stream, err := y.opener.Open()
	if err == nil {
		_, err = stream.Write([]byte{kind})
	}
	return stream, err
}

func (y *yardstick) echo() (float64, error) {
	stream, err := y.open(echoes)
	if err != nil {
		return 0, err
	}
	defer stream.Close()
	message := make([]byte, messageSize)
	return y.median(func() error { return exchange(stream, message, message) })
}

func (y *yardstick) openEchoClose() (float64, error) {
	asked := append([]byte{echoes}, make([]byte, messageSize)...)
	return y.median(func() error {
		stream, err := y.opener.Open()
		if err != nil {
			return err
		}
		defer stream.Close()
		return exchange(stream, asked, asked[1:])
	})
}

func (y *yardstick) echoBesideBulk() (float64, error) {
	for number := 0; number < bulkStreams; number++ {
		stop, err := y.bulk()
		if err != nil {
			return 0, err
		}
		defer stop()
	}
	time.Sleep(settling)
	return y.echo()
}

func (y *yardstick) stream() (float64, error) {
	stop, err := y.bulk()
	if err != nil {
		return 0, err
	}
	defer stop()
	time.Sleep(settling)
	before, began := y.came.Load(), time.Now()
	time.Sleep(y.span)
	return float64(y.came.Load()-before) / time.Since(began).Seconds() / 1e6, nil
}

// bulk writes to a stream until it is stopped.
func (y *yardstick) bulk() (stop func(), err error) {
	stream, err := y.open(counts)
	if err != nil {
		return nil, err
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		piece := make([]byte, writeSize)
		for err := error(nil); err == nil; {
			_, err = stream.Write(piece)
		}
	}()
	return func() {
		stream.Close()
		<-ended
	}, nil
}

// median calls measured as long as a figure takes; it is in microseconds.
func (y *yardstick) median(measured func() error) (float64, error) {
	var took []float64
	for end := time.Now().Add(y.span); time.Now().Before(end); {
		began := time.Now()
		if err := measured(); err != nil {
			return 0, err
		}
		took = append(took, float64(time.Since(began).Nanoseconds())/1e3)
	}
	if len(took) == 0 {
		return 0, fmt.Errorf("-seconds is %v, expected more than 0", y.span.Seconds())
	}
	sort.Float64s(took)
	return took[len(took)/2], nil
}

// exchange sends a message, and reads its echo over it.
func exchange(stream net.Conn, message, echo []byte) error {
	if _, err := stream.Write(message); err != nil {
		return err
	}
	_, err := io.ReadFull(stream, echo)
	return err
}
