package main

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	mathrand "math/rand/v2"
	"net/http"
	"net/netip"
	"net/textproto"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

// Header is one field of a webhook or of an answer: its name in canonical
// form and its values in the order they came. Value bytes are kept as received.
type Header struct {
	Name   string
	Values []string
}

// Webhook is the captured request of a provider as plain data. It is
// immutable after capture; every forwarding attempt builds a fresh request
// from it.
type Webhook struct {
	ID      string // unguessable, stable over deliveries; empty from a legacy server
	Method  string
	Path    string // as received: never decoded, never cleaned
	Query   string // as received with its leading "?"; empty when there was none
	Headers []Header
	Body    []byte
	Time    time.Time     // when it came, by the clock of the replica that took it
	Mode    string        // what its sender waits for; empty from a legacy server
	Timeout time.Duration // for which it waits; 0 in accept
}

// Response modes: what a provider is told, and when.
const (
	modeAccept   = "accept"   // 200 as soon as the bus took the event
	modeStatus   = "status"   // the target's status
	modeResponse = "response" // the target's status, headers and body
)

// respond reports whether the sender of a webhook waits for the target.
func respond(mode string) bool { return mode == modeStatus || mode == modeResponse }

// Answer is what the target said to one webhook, or why it said nothing.
type Answer struct {
	Status  int // 200 to 599; 0 when Err is set
	Headers []Header
	Body    []byte
	Err     string // answerUnreachable or answerTimeout
}

const (
	answerUnreachable = "unreachable" // no connection to the target, or it broke
	answerTimeout     = "timeout"     // the target was silent until the event's time was over
)

// hopByHop lists what never crosses the relay: the fixed part of RFC 9110
// section 7.6.1, credentials meant for a proxy (RFC 9110 section 11.7), and
// the framing and expectation of the first hop, which every hop computes anew.
var hopByHop = map[string]bool{
	"Connection": true, "Proxy-Connection": true, "Keep-Alive": true, "Te": true,
	"Transfer-Encoding": true, "Upgrade": true, "Trailer": true,
	"Proxy-Authenticate": true, "Proxy-Authorization": true,
	"Content-Length": true, "Expect": true,
}

// relaysOwn tells whether a header name belongs to the relay: nobody outside
// may set those. Targets behind CGI or WSGI read "_" as "-".
func relaysOwn(name string) bool {
	const prefix = "x-relay-"
	return len(name) >= len(prefix) && strings.EqualFold(strings.ReplaceAll(name[:len(prefix)], "_", "-"), prefix)
}

// endToEnd returns the fields of h that cross the relay, sorted by name:
// without those named in Connection, then without the fixed hop-by-hop list
// (RFC 9110 section 7.6.1), and without any name of the relay's own.
func endToEnd(h map[string][]string) []Header {
	var named map[string]bool
	for _, v := range h["Connection"] {
		for name := range strings.SplitSeq(v, ",") {
			if named == nil {
				named = map[string]bool{}
			}
			named[textproto.CanonicalMIMEHeaderKey(textproto.TrimString(name))] = true
		}
	}
	fields := make([]Header, 0, len(h)+2)
	for name, values := range h {
		if len(values) > 0 && !hopByHop[name] && !named[name] && !relaysOwn(name) {
			fields = append(fields, Header{name, values})
		}
	}
	slices.SortFunc(fields, func(a, b Header) int { return cmp.Compare(a.Name, b.Name) })
	return fields
}

// requestTarget is a request target taken apart: the one reading of it that
// routing, authorisation, checks and forwarding share. Nothing is decoded.
type requestTarget struct {
	Path, Query string // as received; Query with its leading "?"
	Kind        string // the first segment of Path: webhooks, subscribe
	Channel     string // the second
	Tail        string // what follows Channel, with its leading "/"
}

var errTarget = errors.New("request target is neither a path nor an http or https URL")

// parseTarget takes a raw request target apart (RFC 9112 section 3.2): the
// origin form, or the absolute form, which loses its scheme and authority.
func parseTarget(raw string) (t requestTarget, err error) {
	rest := raw
	if !strings.HasPrefix(raw, "/") {
		scheme, after, absolute := strings.Cut(raw, "://")
		end := strings.IndexAny(after, "/?#")
		if !absolute || end <= 0 || after[end] != '/' || !strings.EqualFold(scheme, "http") && !strings.EqualFold(scheme, "https") {
			return t, errTarget
		}
		rest = after[end:]
	}
	t.Path = rest
	if i := strings.IndexByte(rest, '?'); i >= 0 {
		t.Path, t.Query = rest[:i], rest[i:]
	}
	var below string
	t.Kind, below, _ = strings.Cut(t.Path[1:], "/")
	t.Channel = below
	if i := strings.IndexByte(below, '/'); i >= 0 {
		t.Channel, t.Tail = below[:i], below[i:]
	}
	return t, nil
}

// webhook is nil when t may be forwarded: exactly /webhooks/{channel} or below
// it, in any reading that a target may give it.
func (t *requestTarget) webhook() error {
	if t.Kind != "webhooks" || !validName(t.Channel) {
		return errOutside
	}
	return cmp.Or(checkPath(t.Path), checkQuery(t.Query))
}

var errOutside = errors.New("path is not /webhooks/{channel} or below it")

var errPath = errors.New("path has a dot segment, a backslash, a space, a control character or a broken escape")

// checkPath refuses every path that could leave the prefix it is appended to,
// in any reading a target may give it: dot segments, also escaped, behind an
// escaped slash, with parameters ("..;x", as servlet containers read it) or
// before what may look like a query or a fragment ("..#x", as URL parsers do);
// backslashes and control characters, plain or escaped; a plain space, which
// would end it.
func checkPath(path string) error {
	if !strings.HasPrefix(path, "/") || strings.IndexByte(path, ' ') >= 0 {
		return errPath
	}
	plain := path
	if strings.IndexByte(path, '%') >= 0 {
		var err error
		if plain, err = url.PathUnescape(path); err != nil {
			return errPath
		}
	}
	segment := 0
	for i := 0; i <= len(plain); i++ {
		if i == len(plain) || plain[i] == '/' {
			name := plain[segment:i]
			if end := strings.IndexAny(name, ";?#"); end >= 0 {
				name = name[:end]
			}
			if name == "." || name == ".." {
				return errPath
			}
			segment = i + 1
			continue
		}
		if c := plain[i]; c < ' ' || c == 0x7f || c == '\\' {
			return errPath
		}
	}
	return nil
}

// token tells whether s is a token of RFC 9110 section 5.6.2, as methods and
// header names must be.
func token(s string) bool {
	for i := range len(s) {
		c := s[i]
		if c <= ' ' || c >= 0x7f || strings.IndexByte(`"(),/:;<=>?@[\]{}`, c) >= 0 {
			return false
		}
	}
	return s != ""
}

// checkQuery refuses what would end the request line.
func checkQuery(query string) error {
	for i := range len(query) {
		if c := query[i]; c <= ' ' || c == 0x7f {
			return errors.New("query has a control character or a space")
		}
	}
	return nil
}

// checkHeaders refuses names that are no tokens and values that would end
// their line (RFC 9110 section 5.5).
func checkHeaders(headers []Header) error {
	for _, h := range headers {
		if !token(h.Name) {
			return fmt.Errorf("header name %.40q is no token", h.Name)
		}
		for _, v := range h.Values {
			for i := range len(v) {
				if c := v[i]; c < ' ' && c != '\t' || c == 0x7f {
					return fmt.Errorf("header %q has a control character", h.Name)
				}
			}
		}
	}
	return nil
}

// Event is one webhook in transit, encoded once. It is immutable and shared
// by all its subscribers; wire is what travels between replicas.
type Event struct {
	ID      string
	Channel string
	Mode    string
	Only    string // deliver to this subscriber alone; empty: to all
	wire    []byte // the envelope of openEvent, which chunk is the end of
	chunk   []byte // the block of the stream, in the frame of chunkOf

	legacyOnce sync.Once
	legacy     []byte       // what legacyChunk made
	uses       atomic.Int32 // queues that hold it; -1 once its maker has released it, too
}

// wires recycles the memory of events, which is most of what the collector has
// to do under load.
var wires = sync.Pool{New: func() any { return new([]byte) }}

// release gives up one use of e: its maker's, or that of a queue whose stream
// has written it. After the last one nobody may touch its bytes. A use that is
// never given up, such as an evicted subscriber's, leaves e to the collector.
func (e *Event) release() {
	if e.uses.Add(-1) < 0 && cap(e.wire) <= 64<<10 {
		b := e.wire
		e.wire, e.chunk, e.legacy = nil, nil, nil
		wires.Put(&b)
	}
}

// newEvent encodes w for channel: the one encoding that every subscriber on
// every replica gets.
func newEvent(channel string, w *Webhook) *Event {
	e := &Event{ID: w.ID, Channel: channel, Mode: w.Mode}
	size := w.wireSize()
	if !respond(w.Mode) { // held events would only drain the pool
		recycled := wires.Get().(*[]byte)
		if cap(*recycled) <= 2*size { // budgets count bytes that are used
			e.wire = (*recycled)[:0]
		} else {
			wires.Put(recycled)
		}
	}
	e.wire = slices.Grow(e.wire, size)
	e.wire = e.appendEnvelope(e.wire)
	start := len(e.wire)
	e.wire = appendChunk(e.wire, func(b []byte) []byte {
		b = append(b, "id: "...)
		b = append(b, w.ID...)
		b = append(b, "\nevent: webhook\n"...)
		b = w.appendMessage(b)
		return append(b, '\n')
	})
	e.chunk = e.wire[start:]
	return e
}

// chunkHead and chunkTail are what a chunk has around the block (RFC 9112
// section 7.1): eight hexadecimal digits and CRLF; CRLF.
const (
	chunkHead = 10
	chunkTail = 2
)

// appendChunk appends what add appends, as one chunk of HTTP/1.1.
func appendChunk(b []byte, add func([]byte) []byte) []byte {
	start := len(b)
	b = add(append(b, "00000000\r\n"...))
	n := len(b) - start - chunkHead
	for i := start + 7; n > 0; i-- {
		b[i] = hexDigits[n&15]
		n >>= 4
	}
	return append(b, "\r\n"...)
}

const hexDigits = "0123456789abcdef"

// newFrame is an event of the relay's own. It has no id and counts for nothing.
func newFrame(block string) *Event {
	return &Event{chunk: appendChunk(nil, func(b []byte) []byte { return append(b, block...) })}
}

// chunkFor is e in the form that a subscriber reads: HTTP, or the legacy JSON.
func (e *Event) chunkFor(http bool) []byte {
	if http || e.ID == "" {
		return e.chunk
	}
	return e.legacyChunk()
}

// block is a chunk without what is around it.
func block(chunk []byte) []byte { return chunk[chunkHead : len(chunk)-chunkTail] }

// wireSize is at least how many bytes the event of w takes.
func (w *Webhook) wireSize() int {
	n := 512 + 2*len(w.Path) + 2*len(w.Query) + 2*headerBytes(w.Headers)
	if isText(w.Body) {
		return n + len(w.Body) + len(linePrefix)*(bytes.Count(w.Body, []byte("\n"))+1)
	}
	return n + base64.StdEncoding.EncodedLen(len(w.Body))
}

// lineLimit is how many bytes a client takes for one line or event.
const lineLimit = 64 << 20

// size is what e counts for in a queue: the relay's own events, which have no
// id, must not make a subscriber look slow.
func (e *Event) size() int64 {
	if e.ID == "" {
		return 0
	}
	return int64(len(e.chunk))
}

func headerBytes(headers []Header) int {
	n := 0
	for _, h := range headers {
		for _, v := range h.Values {
			n += len(h.Name) + len(v) + 16
		}
	}
	return n
}

// again is e for one more delivery, to one subscriber or (empty) to all. The
// block stays as it is: a client knows from its time how old it is.
func (e *Event) again(only string) *Event {
	n := &Event{ID: e.ID, Channel: e.Channel, Mode: e.Mode, Only: only}
	b := n.appendEnvelope(make([]byte, 0, len(e.chunk)+len(e.Channel)+len(e.ID)+len(only)+32))
	start := len(b)
	n.wire = append(b, e.chunk...)
	n.chunk = n.wire[start:]
	return n
}

// envelopeVersion is the first byte of everything that travels between
// replicas; a replica ignores versions it does not know.
const envelopeVersion = 3

// appendEnvelope begins the form in which an event travels between replicas:
// the version, channel, id, mode, Only, then the chunk as it is.
func (e *Event) appendEnvelope(b []byte) []byte {
	return appendFields(append(b, envelopeVersion), e.Channel, e.ID, e.Mode, e.Only)
}

// openEvent is the inverse of appendEnvelope: the chunk is not parsed, and it
// aliases wire. An event of another channel is refused: with the prefixes "a" and
// "a-b" two relays have names in common.
func openEvent(channel string, wire []byte) (*Event, error) {
	if len(wire) == 0 || wire[0] != envelopeVersion {
		return nil, errEnvelope
	}
	e := &Event{wire: wire}
	var err error
	if e.chunk, err = cutFields(wire[1:], &e.Channel, &e.ID, &e.Mode, &e.Only); err != nil {
		return nil, err
	}
	if e.Channel != channel || e.ID == "" || len(e.chunk) < chunkHead+chunkTail {
		return nil, errEnvelope
	}
	return e, nil
}

var errEnvelope = errors.New("unknown, broken or misdirected envelope")

// appendFields appends strings, each behind its length as a uvarint.
func appendFields(b []byte, fields ...string) []byte {
	for _, f := range fields {
		b = append(binary.AppendUvarint(b, uint64(len(f))), f...)
	}
	return b
}

// cutFields is the inverse of appendFields; it returns what follows them.
func cutFields(b []byte, fields ...*string) ([]byte, error) {
	for _, f := range fields {
		n, size := binary.Uvarint(b)
		if size <= 0 || n > uint64(len(b)-size) {
			return nil, errEnvelope
		}
		*f, b = string(b[size:size+int(n)]), b[size+int(n):]
	}
	return b, nil
}

// linePrefix begins each line of a message on the stream.
const linePrefix = "data: "

// appendMessage appends w as an HTTP message (RFC 9112) with LF for line ends,
// each line as a data line. Bytes above 0x7F before the body stand for the code
// points of the same numbers, because a stream is UTF-8.
func (w *Webhook) appendMessage(b []byte) []byte {
	b = append(append(append(b, linePrefix...), w.Method...), ' ')
	b = appendLatin1(appendLatin1(b, w.Path), w.Query)
	b = append(b, " HTTP/1.1\n"...)
	for _, h := range w.Headers {
		for _, v := range h.Values {
			b = append(append(append(b, linePrefix...), h.Name...), ": "...)
			b = append(appendLatin1(b, v), '\n')
		}
	}
	text, length := isText(w.Body), len(w.Body)
	if !text {
		b = append(b, "data: X-Relay-Body: base64\n"...)
		length = base64.StdEncoding.EncodedLen(length)
	}
	b = strconv.AppendInt(append(b, "data: Content-Length: "...), int64(length), 10)
	b = strconv.AppendInt(append(b, "\ndata: X-Relay-Time: "...), w.Time.UnixMilli(), 10)
	b = append(append(b, "\ndata: X-Relay-Respond: "...), w.Mode...)
	if respond(w.Mode) {
		b = strconv.AppendInt(append(b, "; timeout="...), w.Timeout.Milliseconds(), 10)
	}
	b = append(b, "\ndata:\n"...)
	if !text {
		b = append(b, linePrefix...)
		return append(base64.StdEncoding.AppendEncode(b, w.Body), '\n')
	}
	for rest := w.Body; ; {
		b = append(b, linePrefix...)
		end := bytes.IndexByte(rest, '\n')
		if end < 0 {
			return append(append(b, rest...), '\n')
		}
		b = append(b, rest[:end+1]...)
		rest = rest[end+1:]
	}
}

// isText reports whether a body can be on the stream as it is: valid UTF-8
// without CR, which would end a line. Not so when its lines are so short that
// the prefixes cost more than base64 does.
func isText(body []byte) bool {
	return bytes.IndexByte(body, '\r') < 0 &&
		len(linePrefix)*bytes.Count(body, []byte("\n")) <= len(body)/3+16<<10 && utf8.Valid(body)
}

// appendLatin1 appends s with each byte as the code point of the same number,
// as Node reads headers.
func appendLatin1(b []byte, s string) []byte {
	start := 0
	for i := range len(s) {
		if s[i] >= utf8.RuneSelf {
			b = utf8.AppendRune(append(b, s[start:i]...), rune(s[i]))
			start = i + 1
		}
	}
	return append(b, s[start:]...)
}

// latin1 is the inverse of appendLatin1; ok is false when s holds a code
// point that is no byte.
func latin1(s string) (_ string, ok bool) {
	ascii := true
	for i := 0; i < len(s) && ascii; i++ {
		ascii = s[i] < utf8.RuneSelf
	}
	if ascii {
		return s, true
	}
	b := make([]byte, 0, len(s))
	for _, r := range s {
		if r > 0xff {
			return "", false
		}
		b = append(b, byte(r))
	}
	return string(b), true
}

// The bounds of a head: request line and fields of a message.
const (
	headLimit  = 64 << 10 // bytes
	fieldLimit = 500      // values from outside: each costs more than its bytes
	ownFields  = 8        // values that the relay adds, at most
)

// decodeWebhook reads the data of a webhook event: an HTTP message, which came
// under id. It checks all that may reach the target; hop-by-hop fields are gone
// from what it returns. Its errors hold nothing of the event beyond a method or
// the name of a field.
func decodeWebhook(channel, id string, data []byte) (*Webhook, error) {
	end := bytes.Index(data[:min(len(data), headLimit)], []byte("\n\n"))
	if end < 0 {
		return nil, fmt.Errorf("head is not complete within %d bytes", headLimit)
	}
	head, ok := latin1(string(data[:end]))
	if !ok {
		return nil, errors.New("head has a code point above U+00FF")
	}
	line, rest, _ := strings.Cut(head, "\n")
	method, after, _ := strings.Cut(line, " ")
	target, ok := strings.CutSuffix(after, " HTTP/1.1")
	if !ok {
		return nil, errors.New("no request line of HTTP/1.1")
	}
	if !validName(id) {
		return nil, errors.New("id has characters outside A-Z a-z 0-9 . _ ~ -, or is too long")
	}
	w := &Webhook{ID: id, Method: method}
	fields, err := parseFields(rest)
	if err != nil {
		return nil, err
	}
	own := func(name string) string {
		if v := fields[name]; len(v) > 0 {
			return v[0]
		}
		return ""
	}
	w.Mode, after, _ = strings.Cut(own("X-Relay-Respond"), ";")
	if timeout, ok := strings.CutPrefix(strings.TrimSpace(after), "timeout="); ok {
		ms, _ := strconv.ParseUint(timeout, 10, 31)
		w.Timeout = min(time.Duration(ms)*time.Millisecond, maxResponseTimeout)
	}
	ms, _ := strconv.ParseInt(own("X-Relay-Time"), 10, 64)
	w.Time = time.UnixMilli(ms)
	body := data[end+2:]
	if length := own("Content-Length"); length != strconv.Itoa(len(body)) {
		return nil, fmt.Errorf("body has %d bytes, and not its Content-Length", len(body))
	}
	if own("X-Relay-Body") == "base64" {
		if w.Body, err = base64.StdEncoding.AppendDecode(nil, body); err != nil {
			return nil, errors.New("body is no base64")
		}
	} else if len(body) > 0 {
		w.Body = bytes.Clone(body)
	}
	w.Headers = endToEnd(fields)
	return w, w.aim(channel, target)
}

// parseFields reads field lines that end in LF.
func parseFields(lines string) (map[string][]string, error) {
	n := strings.Count(lines, "\n") + 1
	if n > fieldLimit+ownFields {
		return nil, fmt.Errorf("head has more than %d fields", fieldLimit)
	}
	fields := make(map[string][]string, n)
	values := make([]string, 0, n)
	for line := range strings.SplitSeq(lines, "\n") {
		if line == "" {
			continue
		}
		name, value, ok := strings.Cut(line, ":")
		if !ok || !token(name) {
			return nil, errors.New("head has a line that is no field")
		}
		name = textproto.CanonicalMIMEHeaderKey(name)
		value = textproto.TrimString(value)
		if known := fields[name]; known != nil {
			fields[name] = append(known, value)
		} else {
			values = append(values, value)
			fields[name] = values[len(values)-1 : len(values) : len(values)]
		}
	}
	return fields, nil
}

// aim gives w its target, and checks all that becomes part of a request: nothing
// may break it, or reach anything but what is below the channel.
func (w *Webhook) aim(channel, target string) error {
	t, err := parseTarget(target)
	switch {
	case err != nil:
		return err
	case !token(w.Method):
		return fmt.Errorf("method %.20q is no token", w.Method)
	case t.Channel != channel:
		return errOutside
	}
	w.Path, w.Query = t.Path, t.Query
	return cmp.Or(t.webhook(), checkHeaders(w.Headers))
}

// The legacy form: what legacy servers send, and what readers get that do not
// say X-Relay-Features: http.

// legacyMessage is the data of an unnamed event. Header values hold one code
// point for each byte.
type legacyMessage struct {
	Headers     map[string]any `json:"headers"` // string, or []string when repeated and for set-cookie
	OriginalURL string         `json:"originalUrl"`
	Path        string         `json:"path"`
	Query       map[string]any `json:"query"` // likewise
	Body        *string        `json:"body,omitempty"`
	BodyBase64  []byte         `json:"bodyBase64,omitempty"` // when it is not UTF-8
	Timestamp   int64          `json:"timestamp"`            // milliseconds
}

// legacyChunk is e in the legacy form, made when the first reader of this
// replica needs it.
func (e *Event) legacyChunk() []byte {
	e.legacyOnce.Do(func() {
		e.legacy = appendChunk(nil, func(b []byte) []byte {
			w, err := decodeWebhook(e.Channel, e.ID, unframe(block(e.chunk)))
			if err != nil { // no replica of this version sends such
				return append(b, ": unreadable\n\n"...)
			}
			b = append(append(append(b, "id: "...), e.ID...), "\ndata: "...)
			return append(append(b, w.legacyJSON()...), '\n')
		})
	})
	return e.legacy
}

// unframe is the data of a block that newEvent made.
func unframe(block []byte) []byte {
	data := make([]byte, 0, len(block))
	for line := range bytes.Lines(block) {
		if value, ok := bytes.CutPrefix(line, []byte("data:")); ok {
			data = append(data, bytes.TrimPrefix(value, []byte(" "))...)
		}
	}
	return bytes.TrimSuffix(data, []byte("\n"))
}

// legacyJSON is w as one line of JSON and its end.
func (w *Webhook) legacyJSON() []byte {
	m := legacyMessage{
		Headers:     make(map[string]any, len(w.Headers)+1),
		OriginalURL: string(appendLatin1(nil, w.Path+w.Query)),
		Path:        string(appendLatin1(nil, w.Path)),
		Query:       legacyQuery(w.Query),
		Timestamp:   w.Time.UnixMilli(),
	}
	for _, h := range w.Headers {
		values := make([]string, len(h.Values))
		for i, v := range h.Values {
			values[i] = string(appendLatin1(nil, v))
		}
		if len(values) == 1 && h.Name != "Set-Cookie" {
			m.Headers[strings.ToLower(h.Name)] = values[0]
		} else {
			m.Headers[strings.ToLower(h.Name)] = values
		}
	}
	if utf8.Valid(w.Body) {
		body := string(w.Body)
		m.Body = &body
		m.Headers["content-length"] = strconv.Itoa(len(body))
	} else { // of another length than a legacy client would send
		m.BodyBase64 = w.Body
	}
	var b bytes.Buffer
	encoder := json.NewEncoder(&b)
	encoder.SetEscapeHTML(false)
	encoder.Encode(m) // strings, numbers and maps of them cannot fail
	return b.Bytes()
}

// legacyQuery is the flat object from which legacy clients build their URL:
// every key once, repeated ones as arrays. What cannot be decoded stays as it is.
func legacyQuery(raw string) map[string]any {
	query := map[string]any{}
	for part := range strings.SplitSeq(strings.TrimPrefix(raw, "?"), "&") {
		if part == "" {
			continue
		}
		key, value, _ := strings.Cut(part, "=")
		key, value = unescape(key), unescape(value)
		switch known := query[key].(type) {
		case nil:
			query[key] = value
		case string:
			query[key] = []string{known, value}
		case []string:
			query[key] = append(known, value)
		}
	}
	return query
}

// unescape decodes a part of a query if that makes text.
func unescape(part string) string {
	part = string(appendLatin1(nil, part))
	if plain, err := url.QueryUnescape(part); err == nil && utf8.ValidString(plain) {
		return plain
	}
	return part
}

// decodeLegacy reads the data of an unnamed event, as legacy servers send it,
// with the checks of decodeWebhook.
func decodeLegacy(channel string, data []byte) (*Webhook, error) {
	var m struct {
		Headers     json.RawMessage `json:"headers"`
		OriginalURL string          `json:"originalUrl"`
		Body        string          `json:"body"`
		Timestamp   int64           `json:"timestamp"`
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, jsonError(err)
	}
	target, ok := latin1(m.OriginalURL)
	if !ok {
		return nil, errors.New("originalUrl has a code point above U+00FF")
	}
	w := &Webhook{Method: "POST", Time: time.UnixMilli(m.Timestamp), Body: []byte(m.Body)}
	fields, err := legacyFields(m.Headers)
	if err != nil {
		return nil, err
	}
	w.Headers = endToEnd(fields)
	return w, w.aim(channel, target)
}

// legacyFields reads the headers object: strings, or arrays of strings.
func legacyFields(data json.RawMessage) (map[string][]string, error) {
	if len(data) > headLimit {
		return nil, fmt.Errorf("headers take more than %d bytes", headLimit)
	}
	var list map[string]json.RawMessage
	if len(data) == 0 {
		return nil, nil
	}
	if err := json.Unmarshal(data, &list); err != nil {
		return nil, jsonError(err)
	}
	fields := make(map[string][]string, len(list))
	for name, value := range list {
		values := make([]string, 1)
		var err error
		if value[0] == '[' {
			err = json.Unmarshal(value, &values)
		} else {
			err = json.Unmarshal(value, &values[0])
		}
		if err != nil {
			return nil, jsonError(err)
		}
		for i, v := range values {
			var ok bool
			if values[i], ok = latin1(v); !ok {
				return nil, errors.New("header value has a code point above U+00FF")
			}
		}
		name = textproto.CanonicalMIMEHeaderKey(name)
		if fields[name] = append(fields[name], values...); len(fields) > fieldLimit || len(fields[name]) > fieldLimit {
			return nil, fmt.Errorf("headers have more than %d values", fieldLimit)
		}
	}
	return fields, nil
}

// maxResponseTimeout bounds how long a sender's request may be held, whoever says so.
const maxResponseTimeout = 15 * time.Minute

// jsonError keeps what encoding/json says of form and place and drops what it
// quotes: parts of a payload must not reach a log.
func jsonError(err error) error {
	if e, ok := errors.AsType[*json.SyntaxError](err); ok {
		return fmt.Errorf("malformed JSON at byte %d", e.Offset)
	}
	if e, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return fmt.Errorf("%q is not of type %s", e.Field, e.Type)
	}
	return errors.New("malformed JSON")
}

// validName tells whether s can be a channel or an id: 1 to 128 of the
// unreserved characters of RFC 3986 section 2.3, and no dot segment. The
// Redis channels of the replicas themselves begin with "@", which no name does.
func validName(s string) bool {
	for i := range len(s) {
		c := s[i] | 0x20
		if !('a' <= c && c <= 'z') && !('0' <= s[i] && s[i] <= '9') && strings.IndexByte("._~-", s[i]) < 0 {
			return false
		}
	}
	return 0 < len(s) && len(s) <= 128 && s != "." && s != ".."
}

// A report is an HTTP response: the target's, or why there is none.

// The bounds of a report.
const answerLimit = 1 << 20 // bytes of a target's body

// appendReport appends a, the answer to the event id, as an HTTP/1.1 response.
func (a *Answer) appendReport(b *bytes.Buffer, id string) {
	resp := http.Response{
		StatusCode: a.Status, ProtoMajor: 1, ProtoMinor: 1, Header: make(http.Header, len(a.Headers)+2),
		ContentLength: int64(len(a.Body)), Body: io.NopCloser(bytes.NewReader(a.Body)),
	}
	if len(a.Body) == 0 {
		resp.Body = nil
	}
	for _, h := range a.Headers {
		resp.Header[h.Name] = h.Values
	}
	resp.Header["X-Relay-Event-Id"] = []string{id}
	if a.Err != "" {
		resp.Header["X-Relay-Error"] = []string{a.Err}
		resp.StatusCode = http.StatusBadGateway
		if a.Err == answerTimeout {
			resp.StatusCode = http.StatusGatewayTimeout
		}
	}
	resp.Write(b) // a buffer takes everything
}

// reports reads the reports of one request, one after the other.
type reports struct {
	in  io.LimitedReader
	buf *bufio.Reader
}

func newReports(r io.Reader) *reports {
	rs := &reports{in: io.LimitedReader{R: r}}
	rs.buf = bufio.NewReader(&rs.in)
	return rs
}

var errNoReport = errors.New("no response with an event id, a status from 200 to 599 and a length")

// next reads one report and checks it; io.EOF is the end. The answer is without
// hop-by-hop fields and without Set-Cookie: a cookie of the target means nothing
// to a provider. The body is only kept when wanted says so of the id.
func (rs *reports) next(wanted func(id string) bool) (id string, a Answer, err error) {
	rs.in.N = headLimit
	if _, err := rs.buf.Peek(1); err != nil {
		return "", a, err
	}
	resp, err := http.ReadResponse(rs.buf, nil)
	if err != nil { // it may quote what was sent
		return "", a, errNoReport
	}
	defer resp.Body.Close()
	id, a.Status, a.Err = resp.Header.Get("X-Relay-Event-Id"), resp.StatusCode, resp.Header.Get("X-Relay-Error")
	fields := 0
	for _, values := range resp.Header {
		fields += len(values)
	}
	switch {
	case replicaOf(id) == "" || a.Status < 200 || a.Status > 599 || fields > fieldLimit+ownFields,
		resp.ContentLength < 0 && len(resp.TransferEncoding) == 0 || resp.ContentLength > answerLimit,
		a.Err != "" && a.Err != answerUnreachable && a.Err != answerTimeout:
		return "", a, errNoReport
	}
	rs.in.N = answerLimit + headLimit
	if !wanted(id) {
		_, err = io.Copy(io.Discard, resp.Body)
		return id, a, err
	}
	a.Headers = slices.DeleteFunc(endToEnd(resp.Header), func(h Header) bool { return h.Name == "Set-Cookie" })
	if err := checkHeaders(a.Headers); err != nil {
		return "", a, err
	}
	if a.Body, err = io.ReadAll(resp.Body); err == nil && len(a.Body) > answerLimit {
		err = errNoReport
	}
	return id, a, err
}

// size is what a counts for while it is kept; 0 when there is none.
func (a *Answer) size() int64 {
	if a == nil {
		return 0
	}
	return int64(headerBytes(a.Headers) + len(a.Body))
}

// rank orders answers, best first: success, then what the target itself said,
// then silence, then no connection.
func (a *Answer) rank() int {
	switch {
	case a.Err == answerUnreachable:
		return 700
	case a.Err != "":
		return 600
	default:
		return a.Status / 100 * 100
	}
}

// replicaLength is how long the names are that replicas give themselves.
const replicaLength = 13

// newReplica is a name for a replica: 65 random bits.
func newReplica() string { return rand.Text()[:replicaLength] }

// newID is an id of 130 random bits, made by the replica it starts with.
func newID(replica string) string { return replica + "-" + rand.Text() }

// replicaOf is the replica that made id; empty when id has not exactly the form
// that newID gives it, so that nothing else is ever sent to a replica.
func replicaOf(id string) string {
	for i := range len(id) {
		if c := id[i]; i == replicaLength && c != '-' || i != replicaLength && !('A' <= c && c <= 'Z') && !('2' <= c && c <= '7') {
			return ""
		}
	}
	if len(id) != replicaLength+1+26 {
		return ""
	}
	return id[:replicaLength]
}

// Backoff yields growing delays. It belongs to one goroutine.
type Backoff struct {
	Initial, Max time.Duration
	Factor       float64
	Jitter       bool // each delay is shortened by up to its half
	tries        int
}

// Next is the delay before the next try.
func (b *Backoff) Next() time.Duration {
	d := float64(b.Max)
	if grown := float64(b.Initial) * math.Pow(b.Factor, float64(b.tries)); grown < d {
		d = grown
		b.tries++
	}
	if b.Jitter {
		d -= d / 2 * mathrand.Float64()
	}
	return time.Duration(d)
}

// Reset starts over after a success.
func (b *Backoff) Reset() { b.tries = 0 }

// Bus carries events to the subscribers of all replicas. All methods are safe
// for concurrent use.
type Bus interface {
	// Publish hands e to every replica that has subscribers for its channel
	// and returns how many took it; it answers within a second.
	Publish(ctx context.Context, e *Event) (receivers int, err error)
	// Signal hands sig to the replica it is for, or to all. One with From is
	// waited for, within a second, and receivers is how many took it; without
	// From it is only queued, and receivers means nothing.
	Signal(ctx context.Context, sig Signal) (receivers int, err error)
	// Run serves until ctx ends; only a failure beyond repair ends it earlier.
	Run(ctx context.Context) error
	// Check is nil while the bus works.
	Check(ctx context.Context) error
}

// Signal is what replicas tell each other about held requests.
type Signal struct {
	Kind       string
	To         string // the replica it is for; empty: every one
	From       string // the replica that waits until the bus has taken it
	Channel    string
	Event      string
	Subscriber string
	Client     string // how the client names itself over all its streams
	Data       string
}

// The kinds of Signal.
const (
	signalTaken   = "taken"   // to the holder: Data names the subscribers that Event was delivered to
	signalWritten = "written" // to the holder: a legacy Subscriber has Event on its stream
	signalAnswer  = "answer"  // to the holder: Client's report on Event is Data
	signalReady   = "ready"   // to all: Subscriber of Channel is ready
	signalLeft    = "left"    // to all: Subscriber of Channel is gone
	signalAgain   = "again"   // to all: the bus is back for a replica, publish held events once more
	signalJoined  = "joined"  // to all: one replica more, for the bus itself
)

// encode is the form in which a signal travels between replicas.
func (sig *Signal) encode() []byte {
	return appendFields([]byte{envelopeVersion}, sig.Kind, sig.To, sig.From, sig.Channel, sig.Event, sig.Subscriber, sig.Client, sig.Data)
}

// openSignal is the inverse of encode.
func openSignal(wire []byte) (sig Signal, err error) {
	if len(wire) == 0 || wire[0] != envelopeVersion {
		return sig, errEnvelope
	}
	_, err = cutFields(wire[1:], &sig.Kind, &sig.To, &sig.From, &sig.Channel, &sig.Event, &sig.Subscriber, &sig.Client, &sig.Data)
	return sig, err
}

// Delivery is one event given to one subscriber.
type Delivery struct {
	Subscriber string
	Client     string
	Legacy     bool // cannot answer: written is all it can tell
}

// takenSignal tells the holder of e to whom it went.
func takenSignal(e *Event, taken []Delivery) Signal {
	data, _ := json.Marshal(taken)
	return Signal{Kind: signalTaken, To: replicaOf(e.ID), Event: e.ID, Data: string(data)}
}

// neighbourhood is what shares by address are counted for: the address, or in
// IPv6 its /64, of which everybody has at least one (RFC 6177 section 2).
func neighbourhood(addr netip.Addr) netip.Addr {
	if addr.Is6() && !addr.Is4In6() {
		if p, err := addr.WithZone("").Prefix(64); err == nil {
			return p.Addr()
		}
	}
	return addr.Unmap()
}

// half is the share of n that one party may take, so that others find space.
func half(n int) int { return (n + 1) / 2 }

// Limits bound a Hub. Zero values refuse everything.
type Limits struct {
	Subscribers int   // in total; one channel may have half of them
	PerAddress  int   // from one remote address, or one /64
	Buffer      int64 // bytes of undelivered frames for one subscriber
}

// Hub owns the live subscribers of this replica under one mutex. It sends and
// closes only under it and never blocks, and it keeps nothing for a channel
// without subscribers. With no Watch it is itself the Bus of a one-replica relay.
type Hub struct {
	Limits   Limits
	OnSignal func(Signal)         // set before use; called without mu
	Watch    func(channel string) // set before use; called under mu when channel got its first subscriber or lost its last

	Delivered, Evicted atomic.Int64 // events given to subscribers; subscribers that were too slow

	mu        sync.Mutex
	channels  map[string]*hubChannel
	total     int
	addresses map[netip.Addr]int // by neighbourhood
}

// hubChannel is guarded by Hub.mu.
type hubChannel struct {
	live        bool          // the bus confirmed its subscription
	confirmed   chan struct{} // closed while live; Subscriber.Live of all that came since it was made
	subscribers map[*Subscriber]struct{}
}

// Subscriber is one live stream and its queue, bounded by bytes. Whoever
// subscribes fills in the first part.
type Subscriber struct {
	Client     string // see Signal.Client; empty from a legacy client
	Channel    string
	Addr       netip.Addr
	Credential [32]byte // hash of the token it came with
	HTTP       bool     // it reads webhooks as HTTP messages
	Responds   bool     // its client reports answers
	Drains     bool     // its client knows the drain event
	Write      func()   // writes what Take gives until that is nothing; runs in a goroutine of its own, one at a time

	ID      string
	Live    <-chan struct{} // closed once every replica's events reach it
	Gone    atomic.Bool     // set before abort is called
	Writers sync.WaitGroup  // Write under way; nobody is added once Gone is set

	hub     *Hub
	abort   func() // guarded by hub.mu, like all below: makes a blocked read or write fail; called once, must not block
	writing bool   // Write is under way, or the stream has not begun
	missed  bool   // a held event found no space in queue
	finish  error  // end with this reason once the queue is empty
	reason  error  // why it ended
	queue   []*Event
	bytes   int64 // of queue and of the batch being written
	batch   int64 // bytes of the batch that Take handed out
}

// wake puts the one token into a channel that holds one.
func wake(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// Why a stream ends; logged as its reason.
var (
	errSlow        = errors.New("evicted: slow subscriber, its queue is full")
	errRevoked     = errors.New("evicted: token revoked")
	errPeerGone    = errors.New("peer closed the stream")
	errShutdown    = errors.New("shutting down")
	errStreamAge   = errors.New("stream reached its age")
	errOverdue     = errors.New("evicted: subscriber did not take its events in time")
	errSubscribers = errors.New("too many subscribers")
	errPerAddress  = errors.New("too many subscribers from one address")
	errPerChannel  = errors.New("too many subscribers of one channel")
)

// Subscribe registers s, which then belongs to the hub until Leave. Events
// queue from this moment on; they are complete once s.Live is closed. The
// caller writes the beginning of the stream and then calls s.Write, once.
func (h *Hub) Subscribe(s *Subscriber) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.channels[s.Channel]
	switch near := neighbourhood(s.Addr); {
	case h.total >= h.Limits.Subscribers:
		return errSubscribers
	case h.addresses[near] >= h.Limits.PerAddress:
		return errPerAddress
	case c != nil && len(c.subscribers) >= half(h.Limits.Subscribers):
		return errPerChannel
	}
	s.hub = h
	s.ID = rand.Text()
	s.writing = true
	if h.channels == nil {
		h.channels, h.addresses = map[string]*hubChannel{}, map[netip.Addr]int{}
	}
	h.total++
	h.addresses[neighbourhood(s.Addr)]++
	if c == nil {
		c = &hubChannel{confirmed: make(chan struct{}), subscribers: map[*Subscriber]struct{}{}}
		h.channels[s.Channel] = c
		if h.Watch != nil {
			h.Watch(s.Channel)
		} else {
			c.confirm()
		}
	}
	c.subscribers[s] = struct{}{}
	s.Live = c.confirmed
	return nil
}

// Attach gives s the connection that abort ends. One that has ended already
// is aborted at once.
func (h *Hub) Attach(s *Subscriber, abort func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s.abort = abort
	if s.reason != nil {
		abort()
	}
}

// Leave ends s for reason, unless it ended before; nothing of it stays.
func (h *Hub) Leave(s *Subscriber, reason error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.end(s, reason)
}

// Finish ends s once all that is queued is written.
func (h *Hub) Finish(s *Subscriber, reason error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.writing {
		s.finish = reason
	} else {
		h.end(s, reason)
	}
}

// Subscribers lists the live streams.
func (h *Hub) Subscribers() (list []*Subscriber) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.channels {
		list = slices.AppendSeq(list, maps.Keys(c.subscribers))
	}
	return list
}

// Reason is why s ended; nil while it lives.
func (h *Hub) Reason(s *Subscriber) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return s.reason
}

// end removes s and makes its stream fail. It needs mu.
func (h *Hub) end(s *Subscriber, reason error) {
	if s.reason != nil {
		return
	}
	s.reason = reason
	s.queue = nil
	h.total--
	near := neighbourhood(s.Addr)
	if h.addresses[near]--; h.addresses[near] == 0 {
		delete(h.addresses, near)
	}
	c := h.channels[s.Channel]
	if delete(c.subscribers, s); len(c.subscribers) == 0 {
		delete(h.channels, s.Channel)
		if h.Watch != nil {
			h.Watch(s.Channel)
		}
	}
	s.Gone.Store(true)
	if s.abort != nil {
		s.abort()
	}
}

// Deliver queues e for its channel's subscribers. For an event that asks for
// a response it returns to whom it went. A subscriber whose queue would
// overflow is evicted, unless the event is held and comes again: see Missed. An
// empty queue takes any one event.
func (h *Hub) Deliver(e *Event) (taken []Delivery, n int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.channels[e.Channel]
	if c == nil {
		return nil, 0
	}
	size := e.size()
	for s := range c.subscribers {
		if e.Only != "" && e.Only != s.ID {
			continue
		}
		if s.bytes > 0 && s.bytes+size > h.Limits.Buffer {
			if s.missed = s.missed || respond(e.Mode); respond(e.Mode) {
				continue
			}
			h.Evicted.Add(1)
			h.end(s, errSlow)
			continue
		}
		s.push(e)
		n++
		if respond(e.Mode) {
			taken = append(taken, Delivery{s.ID, s.Client, !s.Responds})
		}
	}
	h.Delivered.Add(int64(n))
	return taken, n
}

// Push queues a frame of the relay's own, such as a heartbeat, for s alone. It
// tells whether s still lives.
func (h *Hub) Push(s *Subscriber, e *Event) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.reason == nil {
		s.push(e)
	}
	return s.reason == nil
}

// push queues e and sees that somebody writes it. It needs hub.mu.
func (s *Subscriber) push(e *Event) {
	e.uses.Add(1)
	s.queue = append(s.queue, e)
	s.bytes += e.size()
	if !s.writing {
		s.writing = true
		s.Writers.Go(s.Write)
	}
}

// burst is how many bytes Take hands out at once, beyond the first event.
const burst = 256 << 10

// Take moves the next batch of queued events to Write, its only caller; the
// batch before counts as written. An empty batch ends Write. dst is reused.
func (s *Subscriber) Take(dst []*Event) []*Event {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	s.bytes -= s.batch
	s.batch = 0
	n := 0
	for n < len(s.queue) && (n == 0 || s.batch+s.queue[n].size() <= burst) {
		s.batch += s.queue[n].size()
		n++
	}
	dst = append(dst[:0], s.queue[:n]...)
	if s.queue = slices.Delete(s.queue, 0, n); len(s.queue) == 0 {
		s.queue = nil // an idle stream costs little
	}
	if n == 0 {
		s.writing = false
		if s.finish != nil {
			s.hub.end(s, s.finish)
		}
	}
	return dst
}

// Missed tells, once, whether held events found no space in the queue of s.
func (s *Subscriber) Missed() bool {
	s.hub.mu.Lock()
	defer s.hub.mu.Unlock()
	missed := s.missed
	s.missed = false
	return missed
}

// Confirm marks a channel's bus subscription as live.
func (h *Hub) Confirm(channel string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c := h.channels[channel]; c != nil {
		c.confirm()
	}
}

func (c *hubChannel) confirm() {
	if !c.live {
		c.live = true
		close(c.confirmed)
	}
}

// Suspend marks all channels as not live: the bus is down. Streams that are
// open stay; new ones wait for Confirm.
func (h *Hub) Suspend() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range h.channels {
		if c.live {
			c.live, c.confirmed = false, make(chan struct{})
		}
	}
}

// Wants tells whether the channel has subscribers here.
func (h *Hub) Wants(channel string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.channels[channel] != nil
}

// Channels lists the channels that have subscribers here.
func (h *Hub) Channels() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Collect(maps.Keys(h.channels))
}

// Count is how many subscribers and channels there are.
func (h *Hub) Count() (subscribers, channels int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.total, len(h.channels)
}

// Publish implements Bus for a relay of one replica.
func (h *Hub) Publish(_ context.Context, e *Event) (int, error) {
	taken, n := h.Deliver(e)
	if respond(e.Mode) && n > 0 {
		h.OnSignal(takenSignal(e, taken))
	}
	return min(n, 1), nil
}

// Signal implements Bus for a relay of one replica.
func (h *Hub) Signal(_ context.Context, sig Signal) (int, error) {
	h.OnSignal(sig)
	return 1, nil
}

// Run implements Bus: the hub has nothing to do.
func (h *Hub) Run(ctx context.Context) error {
	<-ctx.Done()
	return nil
}

// Check implements Bus, and is the proof that nobody sits on mu.
func (h *Hub) Check(ctx context.Context) error {
	for !h.mu.TryLock() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("hub is stuck: %w", ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
	h.mu.Unlock()
	return nil
}
