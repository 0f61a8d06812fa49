// Bare yamux ends over plain TCP: one echoes, the other sends and compares.

package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"log"
	"math/rand"
	"net"

	"github.com/hashicorp/yamux"
)

// becomePeer waits for one TCP connection and takes the given role on it. Who
// dialled says nothing about who is yamux's client.
func becomePeer(listen, role string) (*yamux.Session, error) {
	ends := map[string]func(io.ReadWriteCloser, *yamux.Config) (*yamux.Session, error){
		"server": yamux.Server, "client": yamux.Client,
	}
	end, known := ends[role]
	if !known {
		return nil, fmt.Errorf("-role is %q, expected server or client", role)
	}
	listener, err := net.Listen("tcp", listen)
	if err != nil {
		return nil, err
	}
	fmt.Println("listening", listener.Addr())
	conn, err := listener.Accept()
	listener.Close()
	if err != nil {
		return nil, err
	}
	return end(conn, nil)
}

func runEcho(arguments []string) error {
	flags := newFlags("echo")
	listen := flags.String("listen", "", "")
	role := flags.String("role", "", "")
	parse(flags, arguments, "listen", "role")
	session, err := becomePeer(*listen, *role)
	if err != nil {
		return err
	}
	for {
		stream, err := session.Accept()
		if err != nil {
			log.Printf("session ended: %v", err)
			return nil
		}
		go func() {
			defer stream.Close()
			if _, err := io.Copy(stream, stream); err != nil {
				log.Printf("echo: %v", err)
			}
		}()
	}
}

func runLoad(arguments []string) error {
	flags := newFlags("load")
	listen := flags.String("listen", "", "")
	role := flags.String("role", "", "")
	streams := flags.Int("streams", 1, "")
	size := flags.Int64("bytes", 0, "")
	parse(flags, arguments, "listen", "role", "streams", "bytes")
	session, err := becomePeer(*listen, *role)
	if err != nil {
		return err
	}
	defer session.Close()

	results := make(chan error, *streams)
	for number := 0; number < *streams; number++ {
		go func(number int) {
			err := compareEcho(session, int64(number), *size)
			if err != nil {
				err = fmt.Errorf("stream number %d: %w", number, err)
			}
			results <- err
		}(number)
	}
	for number := 0; number < *streams; number++ {
		if err := <-results; err != nil {
			return err
		}
	}
	fmt.Println("ok", *streams)
	return nil
}

// compareEcho sends size bytes that follow from seed on a stream of its own,
// half-closes it, and reads the echo meanwhile, to its EOF.
func compareEcho(session *yamux.Session, seed, size int64) error {
	stream, err := session.Open()
	if err != nil {
		return err
	}
	defer stream.Close()
	sent := sha256.New()
	sending := make(chan error, 1)
	go func() {
		noise := io.LimitReader(rand.New(rand.NewSource(seed)), size)
		_, err := io.Copy(io.MultiWriter(stream, sent), noise)
		stream.Close() // a FIN: yamux still reads the other way
		sending <- err
	}()

	echoed := sha256.New()
	count, err := io.Copy(echoed, stream)
	if err != nil {
		return fmt.Errorf("reading: %w", err)
	}
	if count != size { // also how a session that died shows: yamux reports it as EOF
		return fmt.Errorf("%d bytes came back, expected %d", count, size)
	}
	if err := <-sending; err != nil {
		return fmt.Errorf("sending: %w", err)
	}
	if !bytes.Equal(echoed.Sum(nil), sent.Sum(nil)) {
		return fmt.Errorf("other bytes came back than were sent")
	}
	return nil
}
