// What goes over a stream: control messages, the token in them, data headers.

package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// register is an agent's first message. Agents of different age name the
// token differently; exactly one of the two fields is sent.
type register struct {
	Type      string            `json:"type"`
	Token     string            `json:"token,omitempty"`
	AuthToken string            `json:"auth_token,omitempty"`
	Routes    map[string]string `json:"routes"`
	Modes     map[string]string `json:"modes,omitempty"`
}

// ack is the gateway's answer to register; after a refusal it hangs up.
type ack struct {
	Type  string `json:"type"`
	OK    bool   `json:"ok"`
	Error string `json:"error,omitempty"`
}

// heartbeat is a ping or a pong. TS is the sender's clock in milliseconds.
type heartbeat struct {
	Type string `json:"type"`
	TS   int64  `json:"ts"`
}

func newHeartbeat(kind string) heartbeat {
	return heartbeat{Type: kind, TS: time.Now().UnixMilli()}
}

// send writes one message and its newline in one write.
func send(control io.Writer, message any) error {
	return json.NewEncoder(control).Encode(message)
}

// receive reads one message. The decoder is made anew each time and takes
// whatever one read gives it: a second message in the same read is lost with
// it. The Go program does so too, and peers must live with it.
func receive(control io.Reader, message any) error {
	return json.NewDecoder(control).Decode(message)
}

// tokenLifetime is the Go agent's default; a token is made for each attempt.
const tokenLifetime = time.Hour

const tokenHead = `{"alg":"HS256","typ":"JWT"}`

type claims struct {
	Issuer   string `json:"iss"`
	IssuedAt int64  `json:"iat"`
	Expires  int64  `json:"exp"`
}

func makeToken(secret, issuer string) (string, error) {
	now := time.Now()
	body, err := json.Marshal(claims{issuer, now.Unix(), now.Add(tokenLifetime).Unix()})
	if err != nil {
		return "", err
	}
	signed := encodePart([]byte(tokenHead)) + "." + encodePart(body)
	return signed + "." + encodePart(signature(secret, signed)), nil
}

// checkToken says why a token does not count (RFC 7519 §7.2), or nil.
func checkToken(secret, token string) error {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return fmt.Errorf("token of %d parts, expected 3", len(parts))
	}
	var head struct {
		Algorithm string `json:"alg"`
	}
	if err := decodePart(parts[0], &head); err != nil {
		return err
	}
	if head.Algorithm != "HS256" {
		return fmt.Errorf("token signed with %q, expected HS256", head.Algorithm)
	}
	came, err := base64.RawURLEncoding.DecodeString(parts[2])
	if err != nil {
		return err
	}
	if !hmac.Equal(came, signature(secret, parts[0]+"."+parts[1])) {
		return errors.New("token signed with another secret")
	}
	var body claims
	if err := decodePart(parts[1], &body); err != nil {
		return err
	}
	if time.Now().Unix() >= body.Expires {
		return errors.New("token expired")
	}
	return nil
}

func signature(secret, signed string) []byte {
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(signed))
	return mac.Sum(nil)
}

func encodePart(part []byte) string { return base64.RawURLEncoding.EncodeToString(part) }

func decodePart(part string, value any) error {
	text, err := base64.RawURLEncoding.DecodeString(part)
	if err != nil {
		return err
	}
	return json.Unmarshal(text, value)
}

// headerVersion is the only one there is.
const headerVersion = 1

// writeDataHeader says whose stream this is: version, length, hostname.
func writeDataHeader(stream io.Writer, hostname string) error {
	header := []byte{headerVersion}
	header = binary.BigEndian.AppendUint16(header, uint16(len(hostname)))
	_, err := stream.Write(append(header, hostname...))
	return err
}

func readDataHeader(stream io.Reader) (hostname string, err error) {
	var fixed struct {
		Version uint8
		Length  uint16
	}
	if err := binary.Read(stream, binary.BigEndian, &fixed); err != nil {
		return "", err
	}
	if fixed.Version != headerVersion {
		return "", fmt.Errorf("data header version %d, expected %d", fixed.Version, headerVersion)
	}
	name := make([]byte, fixed.Length)
	_, err = io.ReadFull(stream, name)
	return string(name), err
}
